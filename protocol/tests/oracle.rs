//! Every layout and number of ours against independent crates: the Linux
//! headers as `virtio-bindings` gives them, and `linux-loader`'s PVH
//! structures.

use pvkit_protocol::pvh;
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, Geometry, ID_BYTES, LIFETIME_BYTES, Lifetime, RANGE_BYTES,
    RangeFlags, RangeSegment, RequestHeader, RequestType, Topology, status,
};
use pvkit_protocol::virtio::net::{
    self, ControlHeader, NetConfig, NetFeatures, NetHeader, NetHeaderFlags, NetStatus, ack,
    announce, class, gso, guest_offloads, mac, mq, rx, vlan,
};
use pvkit_protocol::virtio::packed::{self, Event, PackedDescriptor, PackedFlags, PackedPosition};
use pvkit_protocol::virtio::split::{self, Descriptor, DescriptorFlags, QueueSize, UsedElement};
use pvkit_protocol::virtio::{DeviceStatus, Features, mmio};
use std::mem::{offset_of, size_of};
use virtio_bindings::bindings::virtio_blk::{
    virtio_blk_config, virtio_blk_discard_write_zeroes, virtio_blk_outhdr,
};
use virtio_bindings::bindings::virtio_net::{
    virtio_net_config, virtio_net_ctrl_hdr, virtio_net_hdr_v1,
};
use virtio_bindings::bindings::virtio_ring::{vring_desc, vring_used_elem};
use virtio_bindings::{
    virtio_blk as blk, virtio_config as cfg, virtio_mmio as reg, virtio_net as vnet,
    virtio_ring as ring,
};

#[test]
fn split_ring() {
    assert_eq!(size_of::<Descriptor>(), size_of::<vring_desc>());
    assert_eq!(offset_of!(Descriptor, len), offset_of!(vring_desc, len));
    assert_eq!(offset_of!(Descriptor, flags), offset_of!(vring_desc, flags));
    assert_eq!(offset_of!(Descriptor, next), offset_of!(vring_desc, next));
    assert_eq!(size_of::<UsedElement>(), size_of::<vring_used_elem>());
    assert_eq!(
        offset_of!(UsedElement, len),
        offset_of!(vring_used_elem, len)
    );

    assert_eq!(
        u32::from(DescriptorFlags::NEXT.bits()),
        ring::VRING_DESC_F_NEXT
    );
    assert_eq!(
        u32::from(DescriptorFlags::WRITE.bits()),
        ring::VRING_DESC_F_WRITE
    );
    assert_eq!(
        u32::from(DescriptorFlags::INDIRECT.bits()),
        ring::VRING_DESC_F_INDIRECT
    );
    assert_eq!(
        u32::from(split::AVAIL_F_NO_INTERRUPT),
        ring::VRING_AVAIL_F_NO_INTERRUPT
    );
    assert_eq!(
        u32::from(split::USED_F_NO_NOTIFY),
        ring::VRING_USED_F_NO_NOTIFY
    );
    assert_eq!(split::DESCRIPTOR_ALIGN as u32, ring::VRING_DESC_ALIGN_SIZE);
    assert_eq!(split::AVAIL_ALIGN as u32, ring::VRING_AVAIL_ALIGN_SIZE);
    assert_eq!(split::USED_ALIGN as u32, ring::VRING_USED_ALIGN_SIZE);

    // The flexible arrays of `struct vring_avail` and `struct vring_used`.
    assert_eq!(split::AVAIL_IDX, offset_of!(ring::vring_avail, idx));
    assert_eq!(split::AVAIL_RING, offset_of!(ring::vring_avail, ring));
    assert_eq!(split::USED_IDX, offset_of!(ring::vring_used, idx));
    assert_eq!(split::USED_RING, offset_of!(ring::vring_used, ring));
    for power in 0..16 {
        let size = QueueSize::new(1 << power).unwrap();
        let n = usize::from(size.get());
        assert_eq!(
            size.used_event_offset(),
            offset_of!(ring::vring_avail, ring) + 2 * n
        );
        assert_eq!(
            size.avail_event_offset(),
            offset_of!(ring::vring_used, ring) + 8 * n
        );
        assert_eq!(size.avail_bytes(), size.used_event_offset() + 2);
        assert_eq!(size.used_bytes(), size.avail_event_offset() + 2);
        assert_eq!(size.descriptor_bytes(), n * size_of::<vring_desc>());
    }
}

#[test]
fn packed_ring() {
    assert_eq!(
        size_of::<PackedDescriptor>(),
        size_of::<ring::vring_packed_desc>()
    );
    assert_eq!(
        offset_of!(PackedDescriptor, addr),
        offset_of!(ring::vring_packed_desc, addr)
    );
    assert_eq!(
        offset_of!(PackedDescriptor, len),
        offset_of!(ring::vring_packed_desc, len)
    );
    assert_eq!(
        offset_of!(PackedDescriptor, id),
        offset_of!(ring::vring_packed_desc, id)
    );
    assert_eq!(
        packed::DESCRIPTOR_FLAGS,
        offset_of!(ring::vring_packed_desc, flags)
    );
    assert_eq!(
        offset_of!(PackedDescriptor, flags),
        packed::DESCRIPTOR_FLAGS
    );
    assert_eq!(
        packed::EVENT_BYTES,
        size_of::<ring::vring_packed_desc_event>()
    );
    assert_eq!(offset_of!(ring::vring_packed_desc_event, off_wrap), 0);
    assert_eq!(offset_of!(ring::vring_packed_desc_event, flags), 2);
    assert_eq!(
        u32::from(PackedFlags::AVAIL.bits()),
        1 << ring::VRING_PACKED_DESC_F_AVAIL
    );
    assert_eq!(
        u32::from(PackedFlags::USED.bits()),
        1 << ring::VRING_PACKED_DESC_F_USED
    );
    assert_eq!(u32::from(PackedFlags::NEXT.bits()), ring::VRING_DESC_F_NEXT);
    assert_eq!(
        u32::from(PackedFlags::WRITE.bits()),
        ring::VRING_DESC_F_WRITE
    );
    assert_eq!(
        u32::from(PackedFlags::INDIRECT.bits()),
        ring::VRING_DESC_F_INDIRECT
    );
    let place = PackedPosition {
        index: 5,
        wrap: true,
    };
    assert_eq!(
        u32::from(place.to_bits()),
        5 | 1 << ring::VRING_PACKED_EVENT_F_WRAP_CTR
    );
    assert_eq!(
        Event::Enable.to_bits(),
        ring::VRING_PACKED_EVENT_FLAG_ENABLE << 16
    );
    assert_eq!(
        Event::Disable.to_bits(),
        ring::VRING_PACKED_EVENT_FLAG_DISABLE << 16
    );
    assert_eq!(
        Event::At(place).to_bits(),
        ring::VRING_PACKED_EVENT_FLAG_DESC << 16 | u32::from(place.to_bits())
    );
}

#[test]
fn features_and_status() {
    for (ours, theirs) in [
        (Features::INDIRECT_DESC, ring::VIRTIO_RING_F_INDIRECT_DESC),
        (Features::EVENT_IDX, ring::VIRTIO_RING_F_EVENT_IDX),
        (Features::VERSION_1, cfg::VIRTIO_F_VERSION_1),
        (Features::ACCESS_PLATFORM, cfg::VIRTIO_F_ACCESS_PLATFORM),
        (Features::RING_PACKED, cfg::VIRTIO_F_RING_PACKED),
        (Features::IN_ORDER, cfg::VIRTIO_F_IN_ORDER),
        (Features::ORDER_PLATFORM, cfg::VIRTIO_F_ORDER_PLATFORM),
        (Features::SR_IOV, cfg::VIRTIO_F_SR_IOV),
        (Features::NOTIFICATION_DATA, cfg::VIRTIO_F_NOTIFICATION_DATA),
        (Features::NOTIF_CONFIG_DATA, cfg::VIRTIO_F_NOTIF_CONFIG_DATA),
        (Features::RING_RESET, cfg::VIRTIO_F_RING_RESET),
        (Features::ADMIN_VQ, cfg::VIRTIO_F_ADMIN_VQ),
    ] {
        assert_eq!(ours.bits(), 1 << theirs, "{ours:?}");
    }
    for (ours, theirs) in [
        (DeviceStatus::ACKNOWLEDGE, cfg::VIRTIO_CONFIG_S_ACKNOWLEDGE),
        (DeviceStatus::DRIVER, cfg::VIRTIO_CONFIG_S_DRIVER),
        (DeviceStatus::DRIVER_OK, cfg::VIRTIO_CONFIG_S_DRIVER_OK),
        (DeviceStatus::FEATURES_OK, cfg::VIRTIO_CONFIG_S_FEATURES_OK),
        (
            DeviceStatus::DEVICE_NEEDS_RESET,
            cfg::VIRTIO_CONFIG_S_NEEDS_RESET,
        ),
        (DeviceStatus::FAILED, cfg::VIRTIO_CONFIG_S_FAILED),
    ] {
        assert_eq!(u32::from(ours.bits()), theirs, "{ours:?}");
    }
}

#[test]
fn mmio_registers() {
    for (ours, theirs) in [
        (mmio::MAGIC_VALUE, reg::VIRTIO_MMIO_MAGIC_VALUE),
        (mmio::VERSION, reg::VIRTIO_MMIO_VERSION),
        (mmio::DEVICE_ID, reg::VIRTIO_MMIO_DEVICE_ID),
        (mmio::VENDOR_ID, reg::VIRTIO_MMIO_VENDOR_ID),
        (mmio::DEVICE_FEATURES, reg::VIRTIO_MMIO_DEVICE_FEATURES),
        (
            mmio::DEVICE_FEATURES_SEL,
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL,
        ),
        (mmio::DRIVER_FEATURES, reg::VIRTIO_MMIO_DRIVER_FEATURES),
        (
            mmio::DRIVER_FEATURES_SEL,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        ),
        (mmio::QUEUE_SEL, reg::VIRTIO_MMIO_QUEUE_SEL),
        (mmio::QUEUE_SIZE_MAX, reg::VIRTIO_MMIO_QUEUE_NUM_MAX),
        (mmio::QUEUE_SIZE, reg::VIRTIO_MMIO_QUEUE_NUM),
        (mmio::QUEUE_READY, reg::VIRTIO_MMIO_QUEUE_READY),
        (mmio::QUEUE_NOTIFY, reg::VIRTIO_MMIO_QUEUE_NOTIFY),
        (mmio::INTERRUPT_STATUS, reg::VIRTIO_MMIO_INTERRUPT_STATUS),
        (mmio::INTERRUPT_ACK, reg::VIRTIO_MMIO_INTERRUPT_ACK),
        (mmio::STATUS, reg::VIRTIO_MMIO_STATUS),
        (mmio::QUEUE_DESC_LOW, reg::VIRTIO_MMIO_QUEUE_DESC_LOW),
        (mmio::QUEUE_DESC_HIGH, reg::VIRTIO_MMIO_QUEUE_DESC_HIGH),
        (mmio::QUEUE_DRIVER_LOW, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW),
        (mmio::QUEUE_DRIVER_HIGH, reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH),
        (mmio::QUEUE_DEVICE_LOW, reg::VIRTIO_MMIO_QUEUE_USED_LOW),
        (mmio::QUEUE_DEVICE_HIGH, reg::VIRTIO_MMIO_QUEUE_USED_HIGH),
        (mmio::SHM_SEL, reg::VIRTIO_MMIO_SHM_SEL),
        (mmio::SHM_LEN_LOW, reg::VIRTIO_MMIO_SHM_LEN_LOW),
        (mmio::SHM_LEN_HIGH, reg::VIRTIO_MMIO_SHM_LEN_HIGH),
        (mmio::SHM_BASE_LOW, reg::VIRTIO_MMIO_SHM_BASE_LOW),
        (mmio::SHM_BASE_HIGH, reg::VIRTIO_MMIO_SHM_BASE_HIGH),
        (mmio::CONFIG_GENERATION, reg::VIRTIO_MMIO_CONFIG_GENERATION),
        (mmio::CONFIG, reg::VIRTIO_MMIO_CONFIG),
    ] {
        assert_eq!(ours as u32, theirs);
    }
    assert_eq!(
        mmio::InterruptStatus::USED_BUFFER.bits(),
        reg::VIRTIO_MMIO_INT_VRING
    );
    assert_eq!(
        mmio::InterruptStatus::CONFIG_CHANGE.bits(),
        reg::VIRTIO_MMIO_INT_CONFIG
    );
    assert_eq!(mmio::MAGIC.to_le_bytes(), *b"virt");
}

#[test]
fn net_device() {
    for (ours, theirs) in [
        (NetFeatures::CSUM, vnet::VIRTIO_NET_F_CSUM),
        (NetFeatures::GUEST_CSUM, vnet::VIRTIO_NET_F_GUEST_CSUM),
        (
            NetFeatures::CTRL_GUEST_OFFLOADS,
            vnet::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ),
        (NetFeatures::MTU, vnet::VIRTIO_NET_F_MTU),
        (NetFeatures::MAC, vnet::VIRTIO_NET_F_MAC),
        (NetFeatures::GUEST_TSO4, vnet::VIRTIO_NET_F_GUEST_TSO4),
        (NetFeatures::GUEST_TSO6, vnet::VIRTIO_NET_F_GUEST_TSO6),
        (NetFeatures::GUEST_ECN, vnet::VIRTIO_NET_F_GUEST_ECN),
        (NetFeatures::GUEST_UFO, vnet::VIRTIO_NET_F_GUEST_UFO),
        (NetFeatures::HOST_TSO4, vnet::VIRTIO_NET_F_HOST_TSO4),
        (NetFeatures::HOST_TSO6, vnet::VIRTIO_NET_F_HOST_TSO6),
        (NetFeatures::HOST_ECN, vnet::VIRTIO_NET_F_HOST_ECN),
        (NetFeatures::HOST_UFO, vnet::VIRTIO_NET_F_HOST_UFO),
        (NetFeatures::MRG_RXBUF, vnet::VIRTIO_NET_F_MRG_RXBUF),
        (NetFeatures::STATUS, vnet::VIRTIO_NET_F_STATUS),
        (NetFeatures::CTRL_VQ, vnet::VIRTIO_NET_F_CTRL_VQ),
        (NetFeatures::CTRL_RX, vnet::VIRTIO_NET_F_CTRL_RX),
        (NetFeatures::CTRL_VLAN, vnet::VIRTIO_NET_F_CTRL_VLAN),
        (NetFeatures::CTRL_RX_EXTRA, vnet::VIRTIO_NET_F_CTRL_RX_EXTRA),
        (
            NetFeatures::GUEST_ANNOUNCE,
            vnet::VIRTIO_NET_F_GUEST_ANNOUNCE,
        ),
        (NetFeatures::MQ, vnet::VIRTIO_NET_F_MQ),
        (NetFeatures::CTRL_MAC_ADDR, vnet::VIRTIO_NET_F_CTRL_MAC_ADDR),
        (NetFeatures::GUEST_USO4, vnet::VIRTIO_NET_F_GUEST_USO4),
        (NetFeatures::GUEST_USO6, vnet::VIRTIO_NET_F_GUEST_USO6),
        (NetFeatures::HOST_USO, vnet::VIRTIO_NET_F_HOST_USO),
        (NetFeatures::GUEST_HDRLEN, vnet::VIRTIO_NET_F_GUEST_HDRLEN),
        (NetFeatures::SPEED_DUPLEX, vnet::VIRTIO_NET_F_SPEED_DUPLEX),
    ] {
        assert_eq!(ours.bits(), 1 << theirs, "{ours:?}");
    }

    // Theirs goes on behind ours, with what belongs to RSS.
    assert!(net::CONFIG_BYTES <= size_of::<virtio_net_config>());
    for (ours, theirs) in [
        (
            offset_of!(NetConfig, status),
            offset_of!(virtio_net_config, status),
        ),
        (
            offset_of!(NetConfig, max_virtqueue_pairs),
            offset_of!(virtio_net_config, max_virtqueue_pairs),
        ),
        (
            offset_of!(NetConfig, mtu),
            offset_of!(virtio_net_config, mtu),
        ),
        (
            offset_of!(NetConfig, speed),
            offset_of!(virtio_net_config, speed),
        ),
        (
            offset_of!(NetConfig, duplex),
            offset_of!(virtio_net_config, duplex),
        ),
    ] {
        assert_eq!(ours, theirs);
    }
    assert_eq!(
        u32::from(NetStatus::LINK_UP.bits()),
        vnet::VIRTIO_NET_S_LINK_UP
    );
    assert_eq!(
        u32::from(NetStatus::ANNOUNCE.bits()),
        vnet::VIRTIO_NET_S_ANNOUNCE
    );

    assert_eq!(net::HEADER_BYTES, size_of::<virtio_net_hdr_v1>());
    assert_eq!(
        offset_of!(NetHeader, gso_size),
        offset_of!(virtio_net_hdr_v1, gso_size)
    );
    assert_eq!(
        offset_of!(NetHeader, num_buffers),
        offset_of!(virtio_net_hdr_v1, num_buffers)
    );
    for (ours, theirs) in [
        (
            NetHeaderFlags::NEEDS_CSUM.bits(),
            vnet::VIRTIO_NET_HDR_F_NEEDS_CSUM,
        ),
        (
            NetHeaderFlags::DATA_VALID.bits(),
            vnet::VIRTIO_NET_HDR_F_DATA_VALID,
        ),
        (gso::NONE, vnet::VIRTIO_NET_HDR_GSO_NONE),
        (gso::TCPV4, vnet::VIRTIO_NET_HDR_GSO_TCPV4),
        (gso::UDP, vnet::VIRTIO_NET_HDR_GSO_UDP),
        (gso::TCPV6, vnet::VIRTIO_NET_HDR_GSO_TCPV6),
        (gso::UDP_L4, vnet::VIRTIO_NET_HDR_GSO_UDP_L4),
        (gso::ECN, vnet::VIRTIO_NET_HDR_GSO_ECN),
        (ack::OK, vnet::VIRTIO_NET_OK),
        (ack::ERR, vnet::VIRTIO_NET_ERR),
        (class::RX, vnet::VIRTIO_NET_CTRL_RX),
        (rx::PROMISC, vnet::VIRTIO_NET_CTRL_RX_PROMISC),
        (rx::ALLMULTI, vnet::VIRTIO_NET_CTRL_RX_ALLMULTI),
        (rx::ALLUNI, vnet::VIRTIO_NET_CTRL_RX_ALLUNI),
        (rx::NOMULTI, vnet::VIRTIO_NET_CTRL_RX_NOMULTI),
        (rx::NOUNI, vnet::VIRTIO_NET_CTRL_RX_NOUNI),
        (rx::NOBCAST, vnet::VIRTIO_NET_CTRL_RX_NOBCAST),
        (class::MAC, vnet::VIRTIO_NET_CTRL_MAC),
        (mac::TABLE_SET, vnet::VIRTIO_NET_CTRL_MAC_TABLE_SET),
        (mac::ADDR_SET, vnet::VIRTIO_NET_CTRL_MAC_ADDR_SET),
        (class::VLAN, vnet::VIRTIO_NET_CTRL_VLAN),
        (vlan::ADD, vnet::VIRTIO_NET_CTRL_VLAN_ADD),
        (vlan::DEL, vnet::VIRTIO_NET_CTRL_VLAN_DEL),
        (class::ANNOUNCE, vnet::VIRTIO_NET_CTRL_ANNOUNCE),
        (announce::ACK, vnet::VIRTIO_NET_CTRL_ANNOUNCE_ACK),
        (class::MQ, vnet::VIRTIO_NET_CTRL_MQ),
        (mq::VQ_PAIRS_SET, vnet::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET),
        (class::GUEST_OFFLOADS, vnet::VIRTIO_NET_CTRL_GUEST_OFFLOADS),
        (
            guest_offloads::SET,
            vnet::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
        ),
    ] {
        assert_eq!(u32::from(ours), theirs);
    }
    assert_eq!(size_of::<ControlHeader>(), size_of::<virtio_net_ctrl_hdr>());
    assert_eq!(
        u32::from(net::MAX_PAIRS),
        vnet::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX
    );
}

#[test]
fn block_device() {
    for (ours, theirs) in [
        (BlockFeatures::SIZE_MAX, blk::VIRTIO_BLK_F_SIZE_MAX),
        (BlockFeatures::SEG_MAX, blk::VIRTIO_BLK_F_SEG_MAX),
        (BlockFeatures::GEOMETRY, blk::VIRTIO_BLK_F_GEOMETRY),
        (BlockFeatures::RO, blk::VIRTIO_BLK_F_RO),
        (BlockFeatures::BLK_SIZE, blk::VIRTIO_BLK_F_BLK_SIZE),
        (BlockFeatures::FLUSH, blk::VIRTIO_BLK_F_FLUSH),
        (BlockFeatures::TOPOLOGY, blk::VIRTIO_BLK_F_TOPOLOGY),
        (BlockFeatures::CONFIG_WCE, blk::VIRTIO_BLK_F_CONFIG_WCE),
        (BlockFeatures::MQ, blk::VIRTIO_BLK_F_MQ),
        (BlockFeatures::DISCARD, blk::VIRTIO_BLK_F_DISCARD),
        (BlockFeatures::WRITE_ZEROES, blk::VIRTIO_BLK_F_WRITE_ZEROES),
        (BlockFeatures::SECURE_ERASE, blk::VIRTIO_BLK_F_SECURE_ERASE),
        (BlockFeatures::ZONED, blk::VIRTIO_BLK_F_ZONED),
    ] {
        assert_eq!(ours.bits(), 1 << theirs, "{ours:?}");
    }
    for (ours, theirs) in [
        (RequestType::IN, blk::VIRTIO_BLK_T_IN),
        (RequestType::OUT, blk::VIRTIO_BLK_T_OUT),
        (RequestType::FLUSH, blk::VIRTIO_BLK_T_FLUSH),
        (RequestType::GET_ID, blk::VIRTIO_BLK_T_GET_ID),
        (RequestType::DISCARD, blk::VIRTIO_BLK_T_DISCARD),
        (RequestType::WRITE_ZEROES, blk::VIRTIO_BLK_T_WRITE_ZEROES),
        (RequestType::SECURE_ERASE, blk::VIRTIO_BLK_T_SECURE_ERASE),
    ] {
        assert_eq!(ours.0, theirs);
    }
    assert_eq!(u32::from(status::OK), blk::VIRTIO_BLK_S_OK);
    assert_eq!(u32::from(status::IOERR), blk::VIRTIO_BLK_S_IOERR);
    assert_eq!(u32::from(status::UNSUPP), blk::VIRTIO_BLK_S_UNSUPP);
    assert_eq!(ID_BYTES as u32, blk::VIRTIO_BLK_ID_BYTES);

    assert_eq!(size_of::<RequestHeader>(), size_of::<virtio_blk_outhdr>());
    assert_eq!(
        offset_of!(RequestHeader, sector),
        offset_of!(virtio_blk_outhdr, sector)
    );

    assert_eq!(
        RANGE_BYTES,
        size_of::<virtio_blk_discard_write_zeroes>(),
        "a range"
    );
    assert_eq!(
        offset_of!(RangeSegment, num_sectors),
        offset_of!(virtio_blk_discard_write_zeroes, num_sectors)
    );
    assert_eq!(
        offset_of!(RangeSegment, flags),
        offset_of!(virtio_blk_discard_write_zeroes, flags)
    );
    assert_eq!(
        RangeFlags::UNMAP.bits(),
        blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    );
    // What the headers do not have, as §5.2.3 and §5.2.6 print it.
    assert_eq!(BlockFeatures::LIFETIME.bits(), 1 << 15);
    assert_eq!(RequestType::GET_LIFETIME.0, 10);
    assert_eq!(LIFETIME_BYTES, 6);
    let lifetime = Lifetime::from_bytes([1, 0, 2, 0, 11, 0]);
    assert_eq!(lifetime, Lifetime::new(1, 2, 11));

    macro_rules! same_offset {
        ($($ours:ident = $theirs:ident),* $(,)?) => {
            $(assert_eq!(
                offset_of!(BlockConfig, $ours),
                offset_of!(virtio_blk_config, $theirs),
                stringify!($ours)
            );)*
        };
    }
    same_offset!(
        capacity = capacity,
        size_max = size_max,
        seg_max = seg_max,
        geometry = geometry,
        blk_size = blk_size,
        topology = physical_block_exp,
        writeback = wce,
        unused0 = unused,
        num_queues = num_queues,
        max_discard_sectors = max_discard_sectors,
        max_discard_seg = max_discard_seg,
        discard_sector_alignment = discard_sector_alignment,
        max_write_zeroes_sectors = max_write_zeroes_sectors,
        max_write_zeroes_seg = max_write_zeroes_seg,
        write_zeroes_may_unmap = write_zeroes_may_unmap,
        max_secure_erase_sectors = max_secure_erase_sectors,
        max_secure_erase_seg = max_secure_erase_seg,
        secure_erase_sector_alignment = secure_erase_sector_alignment,
    );
    // Ours ends where the zoned characteristics, which we do not offer, begin.
    assert_eq!(
        size_of::<BlockConfig>(),
        offset_of!(virtio_blk_config, zoned)
    );
    let topology = offset_of!(virtio_blk_config, physical_block_exp);
    assert_eq!(
        topology + offset_of!(Topology, min_io_size),
        offset_of!(virtio_blk_config, min_io_size)
    );
    assert_eq!(
        topology + offset_of!(Topology, opt_io_size),
        offset_of!(virtio_blk_config, opt_io_size)
    );
    assert_eq!(size_of::<Geometry>(), 4);
}

#[test]
fn pvh_start_of_day() {
    use linux_loader::loader::elf::start_info::{
        hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
    };
    assert_eq!(size_of::<pvh::StartInfo>(), size_of::<hvm_start_info>());
    assert_eq!(
        offset_of!(pvh::StartInfo, nr_modules),
        offset_of!(hvm_start_info, nr_modules)
    );
    assert_eq!(
        offset_of!(pvh::StartInfo, cmdline_paddr),
        offset_of!(hvm_start_info, cmdline_paddr)
    );
    assert_eq!(
        offset_of!(pvh::StartInfo, memmap_paddr),
        offset_of!(hvm_start_info, memmap_paddr)
    );
    assert_eq!(
        offset_of!(pvh::StartInfo, memmap_entries),
        offset_of!(hvm_start_info, memmap_entries)
    );
    assert_eq!(size_of::<pvh::Module>(), size_of::<hvm_modlist_entry>());
    assert_eq!(
        size_of::<pvh::MemoryMapEntry>(),
        size_of::<hvm_memmap_table_entry>()
    );
    assert_eq!(
        offset_of!(pvh::MemoryMapEntry, kind),
        offset_of!(hvm_memmap_table_entry, type_)
    );
}

/// The numbers that a header of the Linux user interface defines, by name; or
/// `None`, loudly, where the header is not installed.
fn header(name: &str) -> Option<std::collections::HashMap<String, u64>> {
    use std::io::Write;
    let path = format!("/usr/include/linux/{name}");
    let Ok(text) = std::fs::read_to_string(&path) else {
        let _ = writeln!(std::io::stderr().lock(), "skipped: {path} is not installed");
        return None;
    };
    let defines = text.lines().filter_map(|line| {
        let mut words = line.strip_prefix("#define")?.split_whitespace();
        let (name, value) = (words.next()?, words.next()?);
        let value = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => value.parse(),
        };
        Some((name.to_owned(), value.ok()?))
    });
    Some(defines.collect())
}

#[test]
fn virtio_pci_structures() {
    use pvkit_protocol::virtio::pci::{
        Capability, NO_VECTOR, NotifyCapability, WindowCapability, cfg_type, common,
    };
    // `virtio-bindings` has no virtio_pci.h.
    let Some(linux) = header("virtio_pci.h") else {
        return;
    };
    for (ours, theirs) in [
        (offset_of!(Capability, id), "VIRTIO_PCI_CAP_VNDR"),
        (offset_of!(Capability, next), "VIRTIO_PCI_CAP_NEXT"),
        (offset_of!(Capability, len), "VIRTIO_PCI_CAP_LEN"),
        (offset_of!(Capability, cfg_type), "VIRTIO_PCI_CAP_CFG_TYPE"),
        (offset_of!(Capability, bar), "VIRTIO_PCI_CAP_BAR"),
        (offset_of!(Capability, offset), "VIRTIO_PCI_CAP_OFFSET"),
        (offset_of!(Capability, length), "VIRTIO_PCI_CAP_LENGTH"),
        (
            offset_of!(NotifyCapability, multiplier),
            "VIRTIO_PCI_NOTIFY_CAP_MULT",
        ),
        (
            offset_of!(WindowCapability, data),
            "VIRTIO_PCI_NOTIFY_CAP_MULT",
        ),
        (common::DEVICE_FEATURE_SELECT, "VIRTIO_PCI_COMMON_DFSELECT"),
        (common::DEVICE_FEATURE, "VIRTIO_PCI_COMMON_DF"),
        (common::DRIVER_FEATURE_SELECT, "VIRTIO_PCI_COMMON_GFSELECT"),
        (common::DRIVER_FEATURE, "VIRTIO_PCI_COMMON_GF"),
        (common::CONFIG_MSIX_VECTOR, "VIRTIO_PCI_COMMON_MSIX"),
        (common::NUM_QUEUES, "VIRTIO_PCI_COMMON_NUMQ"),
        (common::DEVICE_STATUS, "VIRTIO_PCI_COMMON_STATUS"),
        (common::CONFIG_GENERATION, "VIRTIO_PCI_COMMON_CFGGENERATION"),
        (common::QUEUE_SELECT, "VIRTIO_PCI_COMMON_Q_SELECT"),
        (common::QUEUE_SIZE, "VIRTIO_PCI_COMMON_Q_SIZE"),
        (common::QUEUE_MSIX_VECTOR, "VIRTIO_PCI_COMMON_Q_MSIX"),
        (common::QUEUE_ENABLE, "VIRTIO_PCI_COMMON_Q_ENABLE"),
        (common::QUEUE_NOTIFY_OFF, "VIRTIO_PCI_COMMON_Q_NOFF"),
        (common::QUEUE_DESC, "VIRTIO_PCI_COMMON_Q_DESCLO"),
        (common::QUEUE_DESC + 4, "VIRTIO_PCI_COMMON_Q_DESCHI"),
        (common::QUEUE_DRIVER, "VIRTIO_PCI_COMMON_Q_AVAILLO"),
        (common::QUEUE_DRIVER + 4, "VIRTIO_PCI_COMMON_Q_AVAILHI"),
        (common::QUEUE_DEVICE, "VIRTIO_PCI_COMMON_Q_USEDLO"),
        (common::QUEUE_DEVICE + 4, "VIRTIO_PCI_COMMON_Q_USEDHI"),
        (usize::from(NO_VECTOR), "VIRTIO_MSI_NO_VECTOR"),
        (usize::from(cfg_type::COMMON), "VIRTIO_PCI_CAP_COMMON_CFG"),
        (usize::from(cfg_type::NOTIFY), "VIRTIO_PCI_CAP_NOTIFY_CFG"),
        (usize::from(cfg_type::ISR), "VIRTIO_PCI_CAP_ISR_CFG"),
        (usize::from(cfg_type::DEVICE), "VIRTIO_PCI_CAP_DEVICE_CFG"),
        (usize::from(cfg_type::PCI), "VIRTIO_PCI_CAP_PCI_CFG"),
        (
            usize::from(cfg_type::SHARED_MEMORY),
            "VIRTIO_PCI_CAP_SHARED_MEMORY_CFG",
        ),
    ] {
        assert_eq!(Some(&(ours as u64)), linux.get(theirs), "{theirs}");
    }
}

#[test]
fn pci_capabilities_and_msix() {
    use pvkit_protocol::pci::{
        BAR_IO, BAR_MEMORY_64, BAR_MEMORY_TYPE, BAR_PREFETCHABLE, Command, Status, capability,
        header as offset, msix,
    };
    let Some(linux) = header("pci_regs.h") else {
        return;
    };
    for (ours, theirs) in [
        (u32::from(offset::COMMAND), "PCI_COMMAND"),
        (u32::from(offset::STATUS), "PCI_STATUS"),
        (u32::from(offset::BAR0), "PCI_BASE_ADDRESS_0"),
        (u32::from(offset::bar(5)), "PCI_BASE_ADDRESS_5"),
        (
            u32::from(offset::SUBSYSTEM_VENDOR),
            "PCI_SUBSYSTEM_VENDOR_ID",
        ),
        (u32::from(offset::SUBSYSTEM), "PCI_SUBSYSTEM_ID"),
        (u32::from(offset::CAPABILITIES), "PCI_CAPABILITY_LIST"),
        (u32::from(offset::END), "PCI_STD_HEADER_SIZEOF"),
        (u32::from(Command::MEMORY.bits()), "PCI_COMMAND_MEMORY"),
        (u32::from(Command::BUS_MASTER.bits()), "PCI_COMMAND_MASTER"),
        (
            u32::from(Command::INTX_DISABLE.bits()),
            "PCI_COMMAND_INTX_DISABLE",
        ),
        (u32::from(Status::INTERRUPT.bits()), "PCI_STATUS_INTERRUPT"),
        (
            u32::from(Status::CAPABILITIES.bits()),
            "PCI_STATUS_CAP_LIST",
        ),
        (BAR_IO, "PCI_BASE_ADDRESS_SPACE_IO"),
        (BAR_MEMORY_TYPE, "PCI_BASE_ADDRESS_MEM_TYPE_MASK"),
        (BAR_MEMORY_64, "PCI_BASE_ADDRESS_MEM_TYPE_64"),
        (BAR_PREFETCHABLE, "PCI_BASE_ADDRESS_MEM_PREFETCH"),
        (u32::from(capability::ID), "PCI_CAP_LIST_ID"),
        (u32::from(capability::NEXT), "PCI_CAP_LIST_NEXT"),
        (u32::from(capability::VENDOR), "PCI_CAP_ID_VNDR"),
        (u32::from(capability::MSIX), "PCI_CAP_ID_MSIX"),
        (u32::from(msix::CONTROL), "PCI_MSIX_FLAGS"),
        (u32::from(msix::TABLE), "PCI_MSIX_TABLE"),
        (u32::from(msix::PENDING), "PCI_MSIX_PBA"),
        (u32::from(msix::BYTES), "PCI_CAP_MSIX_SIZEOF"),
        (msix::BAR_MASK, "PCI_MSIX_TABLE_BIR"),
        (
            u32::from(msix::Control::SIZE.bits()),
            "PCI_MSIX_FLAGS_QSIZE",
        ),
        (
            u32::from(msix::Control::FUNCTION_MASK.bits()),
            "PCI_MSIX_FLAGS_MASKALL",
        ),
        (
            u32::from(msix::Control::ENABLE.bits()),
            "PCI_MSIX_FLAGS_ENABLE",
        ),
        (msix::ENTRY_BYTES as u32, "PCI_MSIX_ENTRY_SIZE"),
        (msix::ADDRESS_LOW as u32, "PCI_MSIX_ENTRY_LOWER_ADDR"),
        (msix::ADDRESS_HIGH as u32, "PCI_MSIX_ENTRY_UPPER_ADDR"),
        (msix::DATA as u32, "PCI_MSIX_ENTRY_DATA"),
        (msix::VECTOR_CONTROL as u32, "PCI_MSIX_ENTRY_VECTOR_CTRL"),
        (msix::MASKED, "PCI_MSIX_ENTRY_CTRL_MASKBIT"),
    ] {
        assert_eq!(Some(&u64::from(ours)), linux.get(theirs), "{theirs}");
    }
}
