//! Both drivers of a handover whose QEMUs stream to each other, in the simulations' own world: the input is the schedule,
//! so what is found by luck there is looked for here.

#[path = "../../../tests/sim/rng.rs"]
#[allow(dead_code, reason = "the simulations use all of it")]
pub(crate) mod rng;
#[path = "../../../tests/direct/world.rs"]
#[allow(dead_code, reason = "the simulations use all of it")]
mod world;

use rng::Rng;
use world::World;

pub(crate) fn target(data: &[u8]) {
    let Some((first, schedule)) = data.split_first() else { return };
    let failing = [0, 0, 3, 10][usize::from(first >> 6)];
    World::with(Rng::reading(schedule), u32::from(first & 15), failing).run();
}

/// Nothing goes wrong; and much does.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut random = crate::Random(1);
    let mut drawn = |first: u8| [first].into_iter().chain((0..700).map(|_| random.number() as u8)).collect();
    vec![vec![0; 8], drawn(0), drawn(4), drawn(0x84), drawn(0xc8)]
}
