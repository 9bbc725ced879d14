//! Platforms by what they show: CPUID, DMI and files, composed from each
//! platform's public definition unless a case says that it was recorded.

use std::collections::BTreeMap;

use pvkit_protocol::detect::{
    Cloud, Detection, DmiField, Evidence, KvmFeatures, Leaf, Monitor, Platform, Source, XenMode,
    detect,
};

/// A machine that answers what it was told to.
#[derive(Default)]
struct Fake {
    leaves: BTreeMap<u32, Leaf>,
    dmi: BTreeMap<DmiField, &'static str>,
    files: BTreeMap<&'static str, &'static [u8]>,
    links: BTreeMap<&'static str, &'static str>,
    container: Option<&'static str>,
    /// The length that it claims, whatever it wrote.
    lies: Option<usize>,
}

impl Fake {
    fn new() -> Self {
        Self::default().leaf(0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69])
    }

    fn leaf(mut self, leaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        self.leaves.insert(leaf, Leaf { eax, ebx, ecx, edx });
        self
    }

    fn hypervisor(self) -> Self {
        self.leaf(1, [0, 0, 1 << 31, 0])
    }

    fn signature(self, base: u32, max: u32, text: &[u8; 12]) -> Self {
        let word = |at| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
        self.hypervisor()
            .leaf(base, [max, word(0), word(4), word(8)])
    }

    fn dmi(mut self, field: DmiField, text: &'static str) -> Self {
        self.dmi.insert(field, text);
        self
    }

    fn file(mut self, path: &'static str, text: &'static str) -> Self {
        self.files.insert(path, text.as_bytes());
        self
    }

    /// Namespaces: `initial` or those of a container.
    fn namespaces(mut self, initial: bool) -> Self {
        for (path, first, own) in [
            ("/proc/self/ns/pid", "pid:[4026531836]", "pid:[4026532201]"),
            ("/proc/self/ns/uts", "uts:[4026531838]", "uts:[4026532199]"),
            ("/proc/self/ns/ipc", "ipc:[4026531839]", "ipc:[4026532200]"),
        ] {
            self.links.insert(path, if initial { first } else { own });
        }
        self
    }

    fn give(&self, text: &[u8], into: &mut [u8]) -> usize {
        let length = text.len().min(into.len());
        into[..length].copy_from_slice(&text[..length]);
        self.lies.unwrap_or(length)
    }
}

impl Source for Fake {
    fn cpuid(&self, leaf: u32, _subleaf: u32) -> Option<Leaf> {
        Some(self.leaves.get(&leaf).copied().unwrap_or_default())
    }
    fn dmi(&self, field: DmiField, into: &mut [u8]) -> Option<usize> {
        Some(self.give(self.dmi.get(&field)?.as_bytes(), into))
    }
    fn file(&self, path: &str, into: &mut [u8]) -> Option<usize> {
        Some(self.give(self.files.get(path)?, into))
    }
    fn link(&self, path: &str, into: &mut [u8]) -> Option<usize> {
        Some(self.give(self.links.get(path)?.as_bytes(), into))
    }
    fn exists(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }
    fn init_variable(&self, name: &str, into: &mut [u8]) -> Option<usize> {
        assert_eq!(name, "container", "no other variable is asked for");
        Some(self.give(self.container?.as_bytes(), into))
    }
}

fn platforms(found: &Detection) -> Vec<Platform> {
    found.layers().map(|layer| layer.platform).collect()
}

fn only(source: &Fake) -> Platform {
    let found = detect(source);
    let all = platforms(&found);
    assert_eq!(all.len(), 1, "{found:?}");
    all[0]
}

const BASE: u32 = 0x4000_0000;

#[test]
fn every_signature_names_its_platform() {
    for (text, platform) in [
        (b"KVMKVMKVM\0\0\0", Platform::Kvm),
        (b"Linux KVM Hv", Platform::Kvm),
        (b"XenVMMXenVMM", Platform::Xen),
        (b"Microsoft Hv", Platform::HyperV),
        (b"VMwareVMware", Platform::VMware),
        (b"VBoxVBoxVBox", Platform::VirtualBox),
        (b"bhyve bhyve ", Platform::Bhyve),
        (b"BHyVE BHyVE ", Platform::Bhyve),
        (b"TCGTCGTCGTCG", Platform::QemuTcg),
        (b"prl hyperv  ", Platform::Parallels),
        (b" lrpepyh  vr", Platform::Parallels),
        (b"ACRNACRNACRN", Platform::Acrn),
        (b"QNXQVMBSQG\0\0", Platform::Qnx),
        (b"Jailhouse\0\0\0", Platform::Jailhouse),
        (b"OpenBSDVMM58", Platform::OpenBsdVmm),
        (b"___ NVMM ___", Platform::Nvmm),
        (b"HAXMHAXMHAXM", Platform::Haxm),
        (b"LKVMLKVMLKVM", Platform::Kvmtool),
        (b"SRESRESRESRE", Platform::Sre),
        (b"UnisysSpar64", Platform::Spar),
        (b"EVMMEVMMEVMM", Platform::Evmm),
        (b"Apple VZ\0\0\0\0", Platform::Apple),
    ] {
        let found = detect(&Fake::new().signature(BASE, BASE + 1, text));
        assert_eq!(platforms(&found), [platform]);
        let layer = found.machine().unwrap();
        assert_eq!(layer.evidence, Evidence::Cpuid(BASE));
    }
}

/// Without the hypervisor bit, processors answer these leaves with the data of
/// another one, which a host of ours could have set to a signature.
#[test]
fn bare_metal_has_no_layers() {
    let mut source = Fake::new().signature(BASE, BASE + 1, b"KVMKVMKVM\0\0\0");
    source.leaves.insert(1, Leaf::default());
    let source = source
        .dmi(DmiField::SystemVendor, "Dell Inc.")
        .dmi(DmiField::ProductName, "PowerEdge R650");
    assert_eq!(platforms(&detect(&source)), []);
}

#[test]
fn kvm_behind_hyperv_leaves_is_kvm() {
    let source = Fake::new()
        .signature(BASE, BASE + 5, b"Microsoft Hv")
        .leaf(BASE + 1, [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0])
        .leaf(BASE + 3, [1 << 9, 0, 0, 0])
        .signature(BASE + 0x100, 0, b"KVMKVMKVM\0\0\0")
        .leaf(BASE + 0x101, [1 << 5 | 1 << 24, 0, 0, 0]);
    assert_eq!(only(&source), Platform::Kvm);
    let interfaces = detect(&source).interfaces;
    assert!(interfaces.hyperv.unwrap().has_tsc_page());
    // A highest leaf of zero is old KVM's: its features count.
    let features = KvmFeatures::STEAL_TIME | KvmFeatures::CLOCKSOURCE_STABLE;
    assert_eq!(interfaces.kvm.unwrap().features, features);
    assert_eq!(interfaces.kvm.unwrap().base, BASE + 0x100);
}

/// A leaf beyond the highest returns anything.
#[test]
fn leaves_beyond_the_highest_do_not_count() {
    let source = Fake::new()
        .signature(BASE, BASE + 1, b"Microsoft Hv")
        .leaf(BASE + 3, [u32::MAX; 4]);
    let hyperv = detect(&source).interfaces.hyperv.unwrap();
    assert_eq!((hyperv.privileges, hyperv.conforms), (0, false));
}

#[test]
fn xen_with_viridian_leaves_is_xen() {
    let source = Fake::new()
        .signature(BASE, BASE + 6, b"Microsoft Hv")
        .signature(BASE + 0x100, BASE + 0x105, b"XenVMMXenVMM")
        .leaf(BASE + 0x101, [4 << 16 | 17, 0, 0, 0])
        .dmi(DmiField::SystemVendor, "Xen");
    let found = detect(&source);
    assert_eq!(platforms(&found), [Platform::Xen]);
    assert_eq!(found.xen, Some(XenMode::Hvm));
    assert_eq!(found.interfaces.xen.unwrap().version, (4, 17));
}

#[test]
fn xen_guest_type_names_the_domain() {
    for (text, mode) in [
        ("PV\n", XenMode::Pv),
        ("HVM\n", XenMode::Hvm),
        ("PVH\n", XenMode::Pvh),
    ] {
        let source = Fake::new()
            .file("/sys/hypervisor/type", "xen\n")
            .file("/sys/hypervisor/guest_type", text);
        let found = detect(&source);
        assert_eq!(platforms(&found), [Platform::Xen]);
        assert_eq!(found.xen, Some(mode));
    }
}

#[test]
fn xen_dom0_shows_the_machine_below() {
    for source in [
        Fake::new().file("/proc/xen/capabilities", "control_d\n"),
        Fake::new().file("/sys/hypervisor/properties/features", "00002705\n"),
        Fake::new().file("/sys/hypervisor/properties/features", "00000800\n"),
    ] {
        let dom0 = !source.files.values().any(|text| *text == b"00002705\n");
        let source = source
            .file("/proc/xen", "")
            .dmi(DmiField::SystemVendor, "QEMU");
        let found = detect(&source);
        if dom0 {
            assert_eq!(found.xen, Some(XenMode::Dom0));
            assert_eq!(platforms(&found), [Platform::Xen, Platform::Qemu]);
        } else {
            assert_eq!(found.xen, None);
            assert_eq!(platforms(&found), [Platform::Xen]);
        }
    }
}

#[test]
fn virtualbox_shows_through_borrowed_interfaces() {
    for text in [b"KVMKVMKVM\0\0\0", b"Microsoft Hv"] {
        let source = Fake::new()
            .signature(BASE, BASE + 1, text)
            .dmi(DmiField::SystemVendor, "innotek GmbH")
            .dmi(DmiField::ProductName, "VirtualBox");
        assert_eq!(only(&source), Platform::VirtualBox);
    }
}

#[test]
fn hyperv_and_virtual_pc_share_their_strings() {
    let strings = |source: Fake| {
        source
            .dmi(DmiField::SystemVendor, "Microsoft Corporation")
            .dmi(DmiField::ProductName, "Virtual Machine")
    };
    let hyperv = strings(Fake::new().signature(BASE, BASE + 6, b"Microsoft Hv"));
    assert_eq!(only(&hyperv), Platform::HyperV);
    assert_eq!(only(&strings(Fake::new())), Platform::VirtualPc);
    let tag = "7783-7084-3265-9085-8269-3286-77";
    let azure = hyperv.dmi(DmiField::ChassisAssetTag, tag);
    assert_eq!(detect(&azure).cloud, Some(Cloud::Azure));
}

#[test]
fn hidden_kvm_is_qemu_by_its_strings() {
    let source = Fake::new().hypervisor().dmi(DmiField::SystemVendor, "QEMU");
    let found = detect(&source);
    assert_eq!(platforms(&found), [Platform::Qemu]);
    assert_eq!(found.monitor, Some(Monitor::Qemu));
    let found = detect(&Fake::new().hypervisor());
    assert_eq!(platforms(&found), [Platform::OtherMachine]);
    assert_eq!(found.machine().unwrap().evidence, Evidence::HypervisorBit);
}

#[test]
fn ec2_metal_is_no_virtual_machine() {
    let ec2 = |product| {
        Fake::new()
            .dmi(DmiField::SystemVendor, "Amazon EC2")
            .dmi(DmiField::ProductName, product)
    };
    let metal = detect(&ec2("m5.metal"));
    assert_eq!(platforms(&metal), []);
    assert_eq!(metal.cloud, Some(Cloud::AmazonEc2));
    let guest = ec2("m5.large").signature(BASE, BASE + 1, b"KVMKVMKVM\0\0\0");
    assert_eq!(only(&guest), Platform::Kvm);
}

/// A Firecracker machine whose root came from a Docker image: recorded, with
/// only what detection reads.
#[test]
fn image_of_a_container_is_no_container() {
    let source = Fake::new()
        .signature(BASE, BASE + 1, b"KVMKVMKVM\0\0\0")
        .file("/.dockerenv", "")
        .file(
            "/sys/firmware/acpi/tables/FACP",
            "FACP\x14\x01\0\0\x06fFIRECKFCVMFADT",
        )
        .namespaces(true);
    let found = detect(&source);
    assert_eq!(platforms(&found), [Platform::Kvm]);
    assert_eq!(found.monitor, Some(Monitor::Firecracker));
}

#[test]
fn containers_show_above_their_machine() {
    let kvm = || Fake::new().signature(BASE, BASE + 1, b"KVMKVMKVM\0\0\0");
    let cases = [
        (
            kvm().file("/.dockerenv", "").namespaces(false),
            Platform::Docker,
        ),
        (kvm().file("/.dockerenv", ""), Platform::Docker),
        (
            kvm().file("/run/.containerenv", "").namespaces(false),
            Platform::Podman,
        ),
        (kvm().file("/run/systemd/container", "lxc\n"), Platform::Lxc),
        (
            kvm().file("/run/host/container-manager", "systemd-nspawn\n"),
            Platform::Nspawn,
        ),
        (kvm().namespaces(false), Platform::OtherContainer),
        (kvm().file("/proc/vz", ""), Platform::OpenVz),
        (
            kvm().file("/proc/self/status", "Name:\tsh\nVxID:\t40012\n"),
            Platform::VServer,
        ),
        (
            kvm().file("/proc/version", "Linux version 4.10 BrandZ virtual linux"),
            Platform::IllumosLx,
        ),
    ];
    for (source, container) in cases {
        let found = detect(&source);
        assert_eq!(platforms(&found), [container, Platform::Kvm]);
        assert_eq!(found.container().unwrap().platform, container);
        assert_eq!(found.machine().unwrap().platform, Platform::Kvm);
    }
}

#[test]
fn hosts_of_containers_are_no_containers() {
    let openvz = Fake::new().file("/proc/vz", "").file("/proc/bc", "");
    assert_eq!(platforms(&detect(&openvz)), []);
    let vserver = Fake::new().file("/proc/self/status", "VxID: 0\n");
    assert_eq!(platforms(&detect(&vserver)), []);
}

/// A hardened service has a UTS and an IPC namespace of its own.
#[test]
fn own_uts_namespace_alone_is_no_container() {
    let mut source = Fake::new().namespaces(true);
    source.links.insert("/proc/self/ns/uts", "uts:[4026532199]");
    assert_eq!(platforms(&detect(&source)), []);
}

#[test]
fn init_variable_names_the_manager() {
    for (value, expected) in [
        ("lxc", Some(Platform::Lxc)),
        ("podman", Some(Platform::Podman)),
        // The format of a container, and no manager.
        ("oci", None),
        ("lx", None),
    ] {
        let source = Fake {
            container: Some(value),
            ..Fake::new()
        };
        let found = detect(&source);
        assert_eq!(found.container().map(|layer| layer.platform), expected);
    }
}

#[test]
fn wsl2_with_docker_shows_three_layers() {
    let source = Fake::new()
        .signature(BASE, BASE + 6, b"Microsoft Hv")
        .file(
            "/proc/sys/kernel/osrelease",
            "5.15.153.1-microsoft-standard-WSL2\n",
        )
        .file("/.dockerenv", "")
        .namespaces(false);
    let expected = [Platform::Docker, Platform::Wsl, Platform::HyperV];
    assert_eq!(platforms(&detect(&source)), expected);
}

/// A UML process executes CPUID natively.
#[test]
fn uml_shows_the_machine_below() {
    let source = Fake::new()
        .signature(BASE, BASE + 1, b"KVMKVMKVM\0\0\0")
        .file(
            "/proc/cpuinfo",
            "processor\t: 0\nvendor_id\t: User Mode Linux\nmodel name\t: UML\n",
        );
    let expected = [Platform::Uml, Platform::Kvm];
    assert_eq!(platforms(&detect(&source)), expected);
}

#[test]
fn machines_without_cpuid_show_by_file() {
    let tree = "/proc/device-tree/hypervisor/compatible";
    for (source, platform) in [
        (Fake::default().file(tree, "linux,kvm\0"), Platform::Kvm),
        (
            Fake::default().file(tree, "xen,xen-4.17\0xen,xen\0"),
            Platform::Xen,
        ),
        (Fake::default().file(tree, "vmware\0"), Platform::VMware),
        (
            Fake::default().file(tree, "strange\0"),
            Platform::OtherMachine,
        ),
        (
            Fake::default()
                .file("/proc/device-tree/ibm,partition-name", "a\0")
                .file("/proc/device-tree/hmc-managed?", ""),
            Platform::PowerVm,
        ),
        (
            Fake::default().file("/proc/sysinfo", "VM00 Control Program: z/VM    7.1.0\n"),
            Platform::Zvm,
        ),
        (
            Fake::default().file("/proc/sysinfo", "VM00 Control Program: KVM/Linux\n"),
            Platform::Kvm,
        ),
    ] {
        assert_eq!(only(&source), platform);
    }
}

/// A source that claims more bytes than it was given room for, empty strings,
/// strings that fill the room, and every base occupied.
#[test]
fn lying_source_does_not_panic() {
    for lies in [0, 1, 64, 65, 4097, usize::MAX] {
        let mut source = Fake::new()
            .dmi(DmiField::SystemVendor, "QEMU")
            .file("/proc/version", "\n \0")
            .file("/proc/cpuinfo", "vendor_id")
            .file("/proc/sysinfo", "VM00 Control Program")
            .file("/sys/firmware/acpi/tables/FACP", "FACP")
            .file("/sys/hypervisor/properties/features", "-1")
            .namespaces(false);
        source.lies = Some(lies);
        for number in 0..0x100 {
            source = source.signature(BASE + number * 0x100, u32::MAX, b"KVMKVMKVM\0\0\0");
        }
        let found = detect(&source);
        assert_eq!(found.machine().unwrap().platform, Platform::Kvm);
    }
}

#[test]
fn names_for_programs_are_unique() {
    let mut ids: Vec<_> = Platform::ALL.iter().map(|platform| platform.id()).collect();
    ids.sort_unstable();
    let all = ids.len();
    ids.dedup();
    assert_eq!(ids.len(), all);
    for id in ids {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(id.chars().all(plain), "{id}");
    }
}
