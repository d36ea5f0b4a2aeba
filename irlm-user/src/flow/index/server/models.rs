//! Models at the server. They are chosen once, by the thread of whoever asks last or waits no longer, without the phase's
//! lock: others' waits go on. A host that did not ask by then has no part in them, and nobody waits for it; nor for one that
//! has no connection any more, because its agent has ended, its group has left, or it goes another way.

use super::group::{End, Group, closed, stopping};
use super::{Server, not_in_plan};
use crate::core::models::{Models, SketchItem, Sketches, choose};
use crate::core::units::HostIx;
use crate::core::wire::index_msg::{ErrorCode, IndexMsg, MAX_BATCH};
use crate::flow::index::{Conn, ConnError, TICK};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

impl Server {
    /// Notes that the host has asked, waits for the others and sends it its part of the models.
    pub(super) fn hand_out_models(
        &self,
        conn: &mut Conn,
        group: &Group,
        host: HostIx,
        room: u32,
        wait_ms: u32,
    ) -> Result<(), End> {
        let wait = Duration::from_millis(u64::from(wait_ms)).min(self.opts.max_plan_wait);
        let until = Instant::now() + wait;
        let models = loop {
            let mut phase = group.phase();
            if phase.closed {
                return Err(closed());
            }
            let over = Instant::now() >= until;
            match phase.plan.clone() {
                Some(plan) if plan.part_len(host).is_none() => {
                    drop(phase);
                    return self.send(conn, &not_in_plan(host));
                }
                Some(plan) => {
                    if let Some(models) = &phase.models {
                        break Arc::clone(models);
                    }
                    if !phase.choosing {
                        phase.asked[usize::from(host.0)] = Some(room);
                        // Who has asked and is gone counts: it may be back.
                        let said = |h: HostIx| {
                            let h = usize::from(h.0);
                            phase.asked[h].is_some() || phase.live[h] == 0
                        };
                        if over || plan.sources().iter().all(said) {
                            phase.choosing = true;
                            let rooms = phase.asked.clone();
                            drop(phase);
                            break group.choose_models(&rooms);
                        }
                    }
                }
                None if over => {
                    drop(phase);
                    let text = format!("no plan after {wait:?}, so there are no models");
                    return self.send(conn, &IndexMsg::error(ErrorCode::NotReady, &text));
                }
                None => {}
            }
            if self.stopping() {
                return Err(stopping());
            }
            drop(group.turned.wait_timeout(phase, TICK).unwrap_or_else(PoisonError::into_inner));
            if conn.peer_is_gone() {
                return Err(ConnError::Closed.into());
            }
        };
        let (all, borrows) = (models.lends(host), models.borrows(host));
        let mut from = 0;
        loop {
            let lend = models.piece(&group.index(), host, from, MAX_BATCH);
            from += MAX_BATCH;
            let last = from >= all;
            self.send(conn, &IndexMsg::ModelsPart { last, borrows, lend })?;
            group.phase().last_word = Instant::now();
            if last {
                return Ok(());
            }
        }
    }
}

impl Group {
    fn sketches(&self) -> MutexGuard<'_, Option<Sketches>> {
        self.sketches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a report; none before the plan, and none once models are being chosen.
    pub(super) fn take_sketches(&self, host: HostIx, domain: u16, items: &[SketchItem]) {
        let index = self.index();
        if let Some(sketches) = self.sketches().as_mut() {
            sketches.add(&index, host, domain, items);
        }
    }

    /// Chooses models among the hosts that have asked. The caller has set `choosing`.
    fn choose_models(&self, rooms: &[Option<u32>]) -> Arc<Models> {
        let started = Instant::now();
        let sketches = self.sketches().take().unwrap_or_else(|| Sketches::new(0, 0));
        let models = Arc::new(choose(&sketches, rooms));
        let borrows: u64 = (0..self.source_hosts).map(|h| u64::from(models.borrows(HostIx(h)))).sum();
        tracing::info!(
            group = %self.name, hosts = rooms.iter().flatten().count(), sketches = sketches.len(),
            ignored = sketches.ignored(), models = models.len(), borrows,
            "index: models chosen in {:?}", started.elapsed()
        );
        let mut phase = self.phase();
        phase.models = Some(Arc::clone(&models));
        phase.last_word = Instant::now();
        self.turned.notify_all();
        models
    }
}
