//! Chains that no driver may build.

use super::{Scene, attack, options};
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::{
    Guest, HIGH, HOLE, LOW, Layout, TOP, indirect, linked, readable, then, writable,
};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{RequestType, status};
use pvkit_protocol::virtio::split::{Descriptor, DescriptorFlags};

/// The longest chain that the device takes: 126 segments, header and status.
const LONGEST: u16 = 128;

/// Header, one sector of data, status: what the attacks vary.
fn parts(guest: &mut Guest) -> [Descriptor; 3] {
    let header = guest.set_header(0, RequestType::IN, 1);
    let Layout { data, status, .. } = guest.layout;
    [
        readable(header, 16),
        writable(data, 512),
        writable(status, 1),
    ]
}

#[test]
fn cycles() {
    // OpenVMM #4045, #4036: a worker that follows a cycle spins for ever.
    let fault = Fault::ChainTooLong {
        head: 0,
        max: LONGEST,
    };
    for (name, chain) in [
        ("to itself", vec![then(readable(LOW.start, 16), 0)]),
        (
            "of two",
            vec![
                then(readable(LOW.start, 16), 1),
                then(readable(LOW.start, 16), 0),
            ],
        ),
        (
            "behind a header",
            vec![
                then(readable(LOW.start, 16), 1),
                then(writable(LOW.start, 1), 2),
                then(writable(LOW.start, 1), 1),
            ],
        ),
    ] {
        attack(&format!("direct cycle {name}"), fault, |guest| {
            guest.set_descriptors(0, &chain).offer(0);
        });
        attack(&format!("cycle {name} in a table"), fault, |guest| {
            let table = guest.layout.table;
            let bytes = 16 * chain.len() as u32;
            guest
                .set_table(table, &chain)
                .post(&[indirect(table, bytes)]);
        });
    }
    attack("a cycle behind direct descriptors", fault, |guest| {
        let table = guest.layout.table;
        let [header, data, _] = parts(guest);
        guest
            .set_table(table, &[then(data, 1), then(data, 0)])
            .post(&[header, indirect(table, 32)]);
    });
}

#[test]
fn chains_that_are_too_long() {
    let fault = Fault::ChainTooLong {
        head: 0,
        max: LONGEST,
    };
    for direct in [1, 2, 7] {
        attack("direct descriptors and a full table", fault, |guest| {
            let table = guest.layout.table;
            let [header, data, _] = parts(guest);
            let entries = vec![data; usize::from(LONGEST)];
            let mut chain = vec![header; direct];
            chain.push(indirect(table, 16 * u32::from(LONGEST)));
            guest.set_table(table, &linked(0, &entries)).post(&chain);
        });
    }
}

#[test]
fn next_descriptors_beyond_the_table() {
    for next in [8, 9, 0x7fff, 0xffff] {
        let fault = Fault::Next {
            index: 0,
            next,
            size: 8,
        };
        attack(&format!("direct, next {next}"), fault, |guest| {
            let [header, ..] = parts(guest);
            guest.set_descriptors(0, &[then(header, next)]).offer(0);
        });
    }
    for next in [3, 8, 0xffff] {
        let fault = Fault::Next {
            index: 1,
            next,
            size: 3,
        };
        attack(&format!("in a table, next {next}"), fault, |guest| {
            let table = guest.layout.table;
            let [header, data, status] = parts(guest);
            guest
                .set_table(table, &[then(header, 1), then(data, next), status])
                .post(&[indirect(table, 48)]);
        });
    }
}

#[test]
fn indirect_descriptors_where_none_may_be() {
    let fault = |index| Fault::Indirect { head: 0, index };
    attack("INDIRECT and NEXT", fault(0), |guest| {
        let table = guest.layout.table;
        let chain = parts(guest);
        guest
            .set_table(table, &linked(0, &chain))
            .set_descriptors(0, &[then(indirect(table, 48), 1), chain[2]])
            .offer(0);
    });
    attack("a table in a table", fault(1), |guest| {
        let table = guest.layout.table;
        let [header, ..] = parts(guest);
        guest
            .set_table(table, &[then(header, 1), indirect(table, 32)])
            .post(&[indirect(table, 32)]);
    });
    attack("a table that starts with itself", fault(0), |guest| {
        let table = guest.layout.table;
        guest
            .set_table(table, &[indirect(table, 16)])
            .post(&[indirect(table, 16)]);
    });
    attack("INDIRECT and WRITE in a table", fault(0), |guest| {
        let table = guest.layout.table;
        let flags = DescriptorFlags::INDIRECT | DescriptorFlags::WRITE;
        guest
            .set_table(table, &[Descriptor::new(table, 16, flags, 0)])
            .post(&[indirect(table, 16)]);
    });
}

#[test]
fn indirect_descriptors_that_were_not_negotiated() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    let mut features = guest.split_ring_features();
    features.remove(Features::INDIRECT_DESC);
    guest.boot_with(features);
    assert!(guest.works(1));
    let table = guest.layout.table;
    let chain = parts(guest);
    guest
        .set_table(table, &linked(0, &chain))
        .post(&[indirect(table, 48)]);
    assert_eq!(
        guest.serve().fault,
        Some(Fault::Indirect { head: 0, index: 0 })
    );
    scene.assert_broken_until_reset("indirect without the feature");
}

#[test]
fn tables_of_impossible_lengths() {
    for bytes in [
        0,
        1,
        15,
        17,
        47,
        16 * (u32::from(LONGEST) + 1),
        1 << 20,
        0xffff_fff0,
        u32::MAX,
    ] {
        let fault = Fault::IndirectLen { head: 0, bytes };
        attack(&format!("a table of {bytes} bytes"), fault, |guest| {
            let table = guest.layout.table;
            let chain = parts(guest);
            guest
                .set_table(table, &linked(0, &chain))
                .post(&[indirect(table, bytes)]);
        });
    }
}

#[test]
fn tables_that_are_not_in_ram() {
    for addr in [
        HOLE,
        HIGH.end,
        HIGH.end - 16,
        HIGH.end - 47,
        LOW.start - 1,
        LOW.start - 47,
        TOP.end - 32,
        TOP.start - 16,
        u64::MAX,
        u64::MAX - 46,
        u64::MAX - 47,
        0,
    ] {
        let fault = Fault::IndirectAddr { head: 0, addr };
        attack(&format!("a table at {addr:#x}"), fault, |guest| {
            guest.post(&[indirect(addr, 48)]);
        });
    }
}

#[test]
fn buffers_in_the_wrong_order_or_empty() {
    let order = Fault::Order { head: 0 };
    let empty = Fault::Empty { head: 0 };
    type Build = fn([Descriptor; 3]) -> Vec<Descriptor>;
    let rows: [(&str, Fault, Build); 7] = [
        ("data, header, status", order, |[h, d, s]| vec![d, h, s]),
        ("status, header", order, |[h, _, s]| vec![s, h]),
        ("header, data, header", order, |[h, d, _]| vec![h, d, h]),
        ("an empty header", empty, |[h, d, s]| {
            vec![readable(h.addr.get(), 0), d, s]
        }),
        ("empty data", empty, |[h, d, s]| {
            vec![h, writable(d.addr.get(), 0), s]
        }),
        // CVE-2023-5158 (Linux, vringh): an empty buffer in a chain.
        ("an empty status", empty, |[h, d, s]| {
            vec![h, d, writable(s.addr.get(), 0)]
        }),
        ("an empty buffer that is not in RAM", empty, |[h, d, s]| {
            vec![h, d, writable(HOLE, 0), s]
        }),
    ];
    for (name, fault, build) in rows {
        attack(name, fault, |guest| {
            let chain = build(parts(guest));
            guest.post(&chain);
        });
        attack(&format!("{name}, in a table"), fault, |guest| {
            let chain = build(parts(guest));
            let table = guest.layout.table;
            guest
                .set_table(table, &linked(0, &chain))
                .post(&[indirect(table, 16 * chain.len() as u32)]);
        });
    }
}

#[test]
fn buffers_that_are_not_in_ram() {
    // OpenVMM #4047: address and length that wrap.
    let bad = [
        (HOLE, 512),
        (HIGH.end, 1),
        (HIGH.end - 511, 512),
        (LOW.start - 1, 512),
        (TOP.end - 511, 512),
        (TOP.end, 1),
        (u64::MAX, 1),
        (u64::MAX, 512),
        (u64::MAX - 510, 512),
        (LOW.start, 0xffff_0000),
        (TOP.start, 0xffff_0000),
        (0, 512),
    ];
    for (addr, len) in bad {
        let fault = Fault::Address { head: 0, addr, len };
        attack(
            &format!("data to write at {addr:#x}+{len:#x}"),
            fault,
            |guest| {
                let [header, _, status] = parts(guest);
                guest.post(&[header, writable(addr, len), status]);
            },
        );
        attack(
            &format!("data to read at {addr:#x}+{len:#x}"),
            fault,
            |guest| {
                let [header, _, status] = parts(guest);
                guest.set_header(0, RequestType::OUT, 1);
                guest.post(&[header, readable(addr, len), status]);
            },
        );
        attack(&format!("status at {addr:#x}+{len:#x}"), fault, |guest| {
            let [header, ..] = parts(guest);
            guest.post(&[header, writable(addr, len)]);
        });
    }
    for (addr, len) in [
        (HOLE, 16),
        (HIGH.end - 15, 16),
        (u64::MAX - 14, 16),
        (0, 16),
    ] {
        let fault = Fault::Address { head: 0, addr, len };
        attack(&format!("a header at {addr:#x}"), fault, |guest| {
            let [_, data, status] = parts(guest);
            guest.post(&[readable(addr, len), data, status]);
        });
    }
    // The first half of the header is fine.
    let fault = Fault::Address {
        head: 0,
        addr: HOLE,
        len: 8,
    };
    attack("half a header", fault, |guest| {
        let [header, data, status] = parts(guest);
        guest.post(&[
            readable(header.addr.get(), 8),
            readable(HOLE, 8),
            data,
            status,
        ]);
    });
}

#[test]
fn requests_without_header_or_status() {
    let frame = |readable, writable| Fault::Frame {
        head: 0,
        readable,
        writable,
    };
    attack("no status", frame(16, 0), |guest| {
        let [header, ..] = parts(guest);
        guest.post(&[header]);
    });
    attack("a write without status", frame(528, 0), |guest| {
        let [header, data, _] = parts(guest);
        guest.set_header(0, RequestType::OUT, 1);
        guest.post(&[header, readable(data.addr.get(), 512)]);
    });
    attack("no header", frame(0, 513), |guest| {
        let [_, data, status] = parts(guest);
        guest.post(&[data, status]);
    });
    attack("a short header", frame(15, 513), |guest| {
        let [header, data, status] = parts(guest);
        guest.post(&[readable(header.addr.get(), 15), data, status]);
    });
    attack("only a byte", frame(1, 0), |guest| {
        guest.post(&[readable(LOW.start, 1)]);
    });
}

/// Reads sector 1 with this chain and expects it at `data`.
fn works(name: &str, data: u64, build: impl FnOnce(&mut Guest)) {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    guest.set_header(0, RequestType::IN, 1);
    build(guest);
    let before = guest.remember();
    let served = guest.serve();
    assert_eq!(served.fault, None, "{name}");
    assert_eq!(guest.used(), [(0, 513)], "{name}");
    assert_eq!(guest.peek(data, 512), pattern(1, 512), "{name}");
    let used_ring = guest.used_ring();
    let status = guest.layout.status;
    let allowed = [used_ring, (data, 512), (status, 1), (TOP.end - 1, 1)];
    assert_eq!(guest.changed(&before, &allowed), [0; 0], "{name}");
}

#[test]
fn what_is_unusual_but_right_works() {
    let layout = Layout::at(LOW.start);
    let Layout {
        header,
        status,
        data,
        table,
        ..
    } = layout;
    let ends = [readable(header, 16), writable(status, 1)];
    works("a table at the very end of RAM", data, |guest| {
        let table = TOP.end - 48;
        let chain = parts(guest);
        guest
            .set_table(table, &linked(0, &chain))
            .post(&[indirect(table, 48)]);
    });
    works("a table across two regions", data, |guest| {
        let table = LOW.end - 24;
        let chain = parts(guest);
        guest
            .set_table(table, &linked(0, &chain))
            .post(&[indirect(table, 48)]);
    });
    works("a table that is not aligned", data, |guest| {
        let table = table + 1;
        let chain = parts(guest);
        guest
            .set_table(table, &linked(0, &chain))
            .post(&[indirect(table, 48)]);
    });
    works(
        "INDIRECT with the WRITE flag, which is ignored",
        data,
        |guest| {
            let flags = DescriptorFlags::INDIRECT | DescriptorFlags::WRITE;
            let chain = parts(guest);
            guest
                .set_table(table, &linked(0, &chain))
                .post(&[Descriptor::new(table, 48, flags, 0)]);
        },
    );
    works("data across two regions", LOW.end - 100, |guest| {
        guest.post(&[ends[0], writable(LOW.end - 100, 512), ends[1]]);
    });
    works("data up to the last byte of RAM", HIGH.end - 512, |guest| {
        guest.post(&[ends[0], writable(HIGH.end - 512, 512), ends[1]]);
    });
    works("the status in the last byte of RAM", data, |guest| {
        guest.poke(TOP.end - 1, &[0xee]);
        guest.post(&[ends[0], writable(data, 512), writable(TOP.end - 1, 1)]);
    });
    works("the status in the data's descriptor", data, |guest| {
        guest.post(&[ends[0], writable(data, 513)]);
        guest.layout.status = data + 512;
    });
    works("a chain behind direct descriptors", data, |guest| {
        guest
            .set_table(table, &linked(0, &[writable(data, 512), ends[1]]))
            .post(&[ends[0], indirect(table, 32)]);
    });
    works("the longest chain", data, |guest| {
        let mut chain = vec![ends[0]];
        chain.extend((0..125).map(|byte| writable(data + byte, 1)));
        chain.extend([writable(data + 125, 387), ends[1]]);
        assert_eq!(chain.len(), usize::from(LONGEST));
        guest
            .set_table(table, &linked(0, &chain))
            .post(&[indirect(table, 16 * u32::from(LONGEST))]);
    });
    works("a header of sixteen bytes, each by itself", data, |guest| {
        let mut chain: Vec<_> = (0..16).map(|byte| readable(header + byte, 1)).collect();
        chain.extend([writable(data, 512), ends[1]]);
        guest
            .set_table(table, &linked(0, &chain))
            .post(&[indirect(table, 16 * 18)]);
    });
    works(
        "a header in front of bytes that nobody reads",
        data,
        |guest| {
            guest.post(&[ends[0], readable(HOLE, 512), writable(data, 512), ends[1]]);
        },
    );
}

#[test]
fn a_queue_of_one_descriptor_works_with_tables() {
    let mut scene = Scene::cold(pvkit_host::virtio::block::BlockOptions {
        queue_size: 1,
        ..options()
    });
    let guest = &mut scene.guest;
    guest.size = 1;
    guest.boot();
    let table = guest.layout.table;
    // So that every index wraps.
    for round in 0..66_000u32 {
        guest.set_header(0, RequestType::IN, u64::from(round % 64));
        if round == 0 {
            let chain = parts(guest);
            guest.set_table(table, &linked(0, &chain));
        }
        guest.post(&[indirect(table, 48)]);
        let steps = guest.steps();
        steps.poll(1);
        if round % 1000 == 999 || round > 65_530 {
            assert_eq!(guest.peek(guest.layout.status, 1), [status::OK]);
            let sector = u64::from(round % 64);
            assert_eq!(guest.peek(guest.layout.data, 512), pattern(sector, 512));
        }
    }
    assert_eq!(guest.counters.requests.get(), 66_000);
    assert!(scene.other.works(1));
}
