//! Masks, pending bits and the table, as a guest uses and misuses them.

use super::*;
use std::sync::Mutex;

#[derive(Debug, Default)]
struct Log {
    routes: Mutex<Vec<(u16, Option<Message>)>>,
    sent: Mutex<Vec<(u16, Message)>>,
}

impl Messages for Log {
    fn route(&self, vector: u16, message: Option<Message>) {
        self.routes.lock().unwrap().push((vector, message));
    }
    fn send(&self, vector: u16, message: Message) {
        self.sent.lock().unwrap().push((vector, message));
    }
}

impl Log {
    fn sent(&self) -> Vec<u16> {
        let sent = std::mem::take(&mut *self.sent.lock().unwrap());
        for (vector, message) in &sent {
            assert_eq!(*message, self::message(*vector));
        }
        sent.into_iter().map(|(vector, _)| vector).collect()
    }
    fn routes(&self) -> Vec<(u16, Option<Message>)> {
        std::mem::take(&mut *self.routes.lock().unwrap())
    }
}

fn message(vector: u16) -> Message {
    Message {
        address: 0x1_fee0_0000 + 0x1000 * u64::from(vector),
        data: 0x40 + u32::from(vector),
    }
}

fn at(vector: u16) -> u64 {
    u64::from(vector) * msix::ENTRY_BYTES as u64
}

impl Msix {
    /// Fills an entry as a driver does, and leaves it masked.
    fn fill(&mut self, vector: u16) {
        let Message { address, data } = message(vector);
        self.write_table(at(vector), &(address as u32).to_le_bytes());
        self.write_table(at(vector) + 4, &((address >> 32) as u32).to_le_bytes());
        self.write_table(at(vector) + 8, &data.to_le_bytes());
    }
    fn mask(&mut self, vector: u16, masked: bool) {
        self.write_table(at(vector) + 12, &u32::from(masked).to_le_bytes());
    }
    fn pending(&self) -> u64 {
        let mut bits = [0; 8];
        self.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }
}

fn vectors(count: u16) -> (Msix, Arc<Log>) {
    let log = Arc::new(Log::default());
    let mut msix = Msix::new(count, log.clone());
    for vector in 0..count {
        msix.fill(vector);
    }
    (msix, log)
}

#[test]
fn nothing_is_sent_while_msix_is_off_or_the_vector_does_not_exist() {
    let (mut msix, log) = vectors(2);
    msix.mask(0, false);
    msix.signal(0);
    assert_eq!(
        (log.sent(), log.routes(), msix.pending()),
        (vec![], vec![], 0)
    );
    msix.set_control(MsixControl::ENABLE);
    assert_eq!(log.routes(), [(0, Some(message(0)))]);
    for vector in [2, 3, 0x7ff, 0xffff] {
        msix.signal(vector);
    }
    assert_eq!((log.sent(), msix.pending()), (vec![], 0));
    msix.signal(0);
    assert_eq!(log.sent(), [0]);
}

#[test]
fn a_masked_vector_is_pending_and_sent_once_when_it_is_unmasked() {
    let (mut msix, log) = vectors(3);
    msix.set_control(MsixControl::ENABLE);
    for _ in 0..3 {
        msix.signal(2);
    }
    assert_eq!((log.sent(), msix.pending()), (vec![], 0b100));
    msix.mask(2, false);
    assert_eq!((log.sent(), msix.pending()), (vec![2], 0));
    msix.mask(2, false);
    assert_eq!(log.sent(), [0; 0]);

    // The function's mask, over all vectors.
    msix.mask(1, false);
    msix.set_control(MsixControl::ENABLE | MsixControl::FUNCTION_MASK);
    for vector in [0, 1, 2] {
        msix.signal(vector);
    }
    assert_eq!((log.sent(), msix.pending()), (vec![], 0b111));
    msix.set_control(MsixControl::ENABLE);
    assert_eq!(log.sent(), [1, 2]);
    assert_eq!(msix.pending(), 0b001, "still masked by itself");
    msix.set_control(MsixControl::empty());
    assert_eq!(msix.pending(), 0, "switched off");
}

#[test]
fn routes_are_told_when_they_change_and_only_then() {
    let (mut msix, log) = vectors(1);
    msix.set_control(MsixControl::ENABLE);
    assert_eq!(log.routes(), []);
    msix.mask(0, false);
    msix.mask(0, false);
    assert_eq!(log.routes(), [(0, Some(message(0)))]);
    // Rewritten while it is in use: what a driver must not do, and may.
    msix.write_table(8, &7u32.to_le_bytes());
    let Message { address, .. } = message(0);
    assert_eq!(log.routes(), [(0, Some(Message { address, data: 7 }))]);
    msix.mask(0, true);
    assert_eq!(log.routes(), [(0, None)]);
    // While masked, a rewrite is nobody's business.
    msix.fill(0);
    assert_eq!(log.routes(), []);
}

#[test]
fn the_table_reads_back_in_every_width_and_takes_whole_words_only() {
    let (mut msix, _log) = vectors(2);
    let mut entry = [0; 16];
    msix.read_table(16, &mut entry);
    let Message { address, data } = message(1);
    let mut expected = address.to_le_bytes().to_vec();
    expected.extend(data.to_le_bytes());
    expected.extend(1u32.to_le_bytes());
    assert_eq!(entry[..], expected);
    for width in 1..=8 {
        for offset in 0..=16 - width {
            let mut part = vec![0; width];
            msix.read_table(16 + offset as u64, &mut part);
            assert_eq!(part, expected[offset..offset + width]);
        }
    }
    for (offset, width) in [
        (16, 1),
        (16, 2),
        (17, 4),
        (18, 4),
        (20, 8),
        (16, 3),
        (16, 16),
    ] {
        msix.write_table(offset, &vec![0xff; width]);
    }
    msix.read_table(16, &mut entry);
    assert_eq!(entry[..], expected);
    msix.write_table(16, &[0xff; 8]);
    msix.write_table(24, &[0xff; 8]);
    msix.read_table(16, &mut entry);
    let mut expected = [0xff; 16];
    expected[0] = 0xfc;
    expected[12..].copy_from_slice(&[1, 0, 0, 0]);
    assert_eq!(entry, expected, "reserved bits stay 0");
}

#[test]
fn accesses_beyond_the_table_hurt_nobody() {
    for count in [0, 1, 3, 64, 65, 2048, 0xffff] {
        let log = Arc::new(Log::default());
        let mut msix = Msix::new(count, log.clone());
        assert_eq!(msix.vectors(), count.min(2048));
        msix.set_control(MsixControl::ENABLE);
        let table = msix.table_bytes() as u64;
        for offset in [table, table + 4, 0x8000, u64::MAX - 7, u64::MAX, !7] {
            let mut data = [0xee; 8];
            msix.read_table(offset, &mut data);
            assert_eq!(data, [0; 8]);
            msix.write_table(offset, &data);
            msix.read_pending(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
        for vector in 0..msix.vectors() {
            msix.signal(vector);
        }
        let mut bits = vec![0; msix.pending_bytes() + 8];
        msix.read_pending(0, &mut bits);
        let set: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(set, u32::from(msix.vectors()));
        assert!(bits[msix.pending_bytes()..].iter().all(|byte| *byte == 0));
        assert_eq!(log.sent(), [0; 0]);
    }
}

#[test]
fn the_capability_says_where_everything_is() {
    use crate::pci::FunctionId;
    let mut config = ConfigSpace::new(FunctionId {
        vendor: 1,
        device: 2,
        revision: 0,
        class: (0, 0),
        prog_if: 0,
    });
    let (msix, _log) = vectors(5);
    let at = msix.add_capability(&mut config, 2, 0x1000, 0x2008).unwrap();
    assert_eq!(config.u8_at(at), capability::MSIX);
    assert_eq!(config.u16_at(at + msix::CONTROL), 4);
    assert_eq!(config.u32_at(at + msix::TABLE), 0x1002);
    assert_eq!(config.u32_at(at + msix::PENDING), 0x200a);
    config.write(at, &[0xff; 12]);
    assert_eq!(config.u16_at(at + msix::CONTROL), 0xc004);
    assert_eq!(config.u32_at(at + msix::TABLE), 0x1002);
    let none = Msix::new(0, Arc::new(Log::default()));
    assert_eq!(
        none.add_capability(&mut config, 0, 0, 0),
        Err(ConfigError::NoVectors)
    );
}
