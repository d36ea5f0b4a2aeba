//! Frames over loopback, and the budget of windows.

use super::*;
use crate::net::conn::FrameBuf;
use std::time::Duration;

fn page(n: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    for (i, b) in page.iter_mut().enumerate() {
        *b = (n as usize * 7 + i / 9) as u8;
    }
    page
}

#[test]
fn contents_cross_a_connection_in_every_mode() {
    let modes =
        [(Mode::Off, WINDOW_LOG), (Mode::Auto, WINDOW_LOG), (Mode::Level(3), 16), (Mode::Level(1), 0)];
    for ((mode, window), spare) in modes.into_iter().flat_map(|m| [(m, 0), (m, 1)]) {
        let (out, into) = crate::net::connection::pair();
        let sender = std::thread::spawn(move || {
            let (work, all) = (Work::default(), Arc::new(Windows::default()));
            let workers = Arc::new(Workers::new(spare));
            let mut lane = Lane::beside(mode, all.take(window), &Arc::default(), workers.take());
            assert_eq!(
                workers.take().is_some(),
                spare == 1 && mode == Mode::Off,
                "who does not compress gives it back"
            );
            let mut wire = 0;
            for n in 0..40u64 {
                let pages: Vec<PageBytes> = (0..n % 5 * 13).map(|i| page(n / 3 + i)).collect();
                let refs: Vec<&PageBytes> = pages.iter().collect();
                wire += lane.send(&out, (Kind::Pages, &[n as u8]), &refs, &work, || false).unwrap();
                let compressed = mode != Mode::Auto && lane.squeezes() && !refs.is_empty();
                assert!(lane.is_ahead() || spare == 0 || !compressed);
                if n % 7 == 6 {
                    wire += lane.drain(&out, &work, || false).unwrap();
                    assert!(!lane.is_ahead());
                    assert_eq!(lane.drain(&out, &work, || false).unwrap(), 0);
                }
            }
            wire += lane.drain(&out, &work, || false).unwrap();
            drop(lane);
            assert_eq!(workers.take().is_some(), spare == 1);
            (work.snapshot(), wire)
        });
        let (work, mut laps, mut frames) = (Work::default(), Laps::begin(), FrameBuf::new());
        let mut landing = Landing::new(Arc::new(Windows::default()).take(window));
        let mut wire = 0;
        for n in 0..40u64 {
            let frame = frames.wait(&into, Duration::from_secs(10)).unwrap();
            wire += frame_len(&into, frame.meta.len(), frame.body.len());
            assert_eq!((frame.kind, frame.meta), (Kind::Pages, &[n as u8][..]));
            let pages: Vec<PageBytes> = (0..n % 5 * 13).map(|i| page(n / 3 + i)).collect();
            assert_eq!(landing.contents(&frame, pages.len(), &work, &mut laps).unwrap(), pages);
        }
        let (sent, counted) = sender.join().unwrap();
        assert_eq!(wire, counted, "bytes are counted as they go out");
        assert_eq!(sent.raw_bytes, 8 * (13 + 26 + 39 + 52) * PAGE_SIZE as u64);
        let ratio = sent.wire_bytes as f64 / sent.raw_bytes as f64;
        match mode {
            Mode::Off | Mode::Forwarded => assert!(ratio == 1.0 && sent.by_level.keys().eq(&[0])),
            Mode::Level(n) => assert!(ratio < 0.3 && sent.by_level.keys().eq(&[n]), "{sent:?}"),
            Mode::Auto => assert!(ratio < 1.0, "{sent:?}"),
        }
    }
}

#[test]
fn windows_come_out_of_one_budget_and_go_back() {
    let all = Arc::new(Windows::default());
    assert_eq!((all.take(0).log(), all.take(16).log()), (0, 16));
    let mut held: Vec<Window> = (0..MAX_WINDOWS >> WINDOW_LOG).map(|_| all.take(u8::MAX)).collect();
    assert!(held.iter().all(|w| w.log() == WINDOW_LOG));
    assert_eq!((all.held(), all.take(WINDOW_LOG).log(), all.take(10).log()), (MAX_WINDOWS, 0, 0));
    held.pop();
    assert_eq!(all.take(WINDOW_LOG).log(), WINDOW_LOG, "what is given back can be had again");
    drop(held);
    assert_eq!(all.held(), 0);
}
