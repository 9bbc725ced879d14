//! The names of platforms.

/// Whether a layer has its own kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A machine with its own kernel.
    Machine,
    /// A part of a system that shares its kernel, or an imitation of a kernel.
    Container,
}

macro_rules! platforms {
    ($($(#[$doc:meta])* $variant:ident, $kind:ident, $id:literal, $name:literal, $systemd:literal;)*) => {
        /// A hypervisor, an emulator, or what runs containers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Platform {
            $($(#[$doc])* $variant,)*
        }

        impl Platform {
            /// Every platform.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// A stable name for programs: lower-case letters, digits, hyphens.
            #[must_use]
            pub const fn id(self) -> &'static str {
                match self { $(Self::$variant => $id,)* }
            }

            /// The name for people.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Whether it runs machines or containers.
            #[must_use]
            pub const fn kind(self) -> Kind {
                match self { $(Self::$variant => Kind::$kind,)* }
            }

            /// The name that `systemd-detect-virt` of systemd 252 has for it,
            /// for scripts that compare.
            #[must_use]
            pub const fn systemd_name(self) -> &'static str {
                match self { $(Self::$variant => $systemd,)* }
            }
        }
    };
}

platforms! {
    /// Linux KVM, whatever the monitor.
    Kvm, Machine, "kvm", "KVM", "kvm";
    /// QEMU that emulates the processor.
    QemuTcg, Machine, "qemu-tcg", "QEMU TCG (emulated processor)", "qemu";
    /// QEMU with its accelerator hidden.
    Qemu, Machine, "qemu", "QEMU (accelerator hidden)", "qemu";
    /// Xen.
    Xen, Machine, "xen", "Xen", "xen";
    /// Microsoft Hyper-V.
    HyperV, Machine, "hyperv", "Hyper-V", "microsoft";
    /// Microsoft Virtual PC and Virtual Server.
    VirtualPc, Machine, "virtual-pc", "Microsoft Virtual PC", "vm-other";
    /// VMware.
    VMware, Machine, "vmware", "VMware", "vmware";
    /// Oracle VirtualBox.
    VirtualBox, Machine, "virtualbox", "VirtualBox", "oracle";
    /// FreeBSD's and illumos' bhyve.
    Bhyve, Machine, "bhyve", "bhyve", "bhyve";
    /// Parallels.
    Parallels, Machine, "parallels", "Parallels", "parallels";
    /// ACRN.
    Acrn, Machine, "acrn", "ACRN", "acrn";
    /// User-Mode Linux.
    Uml, Machine, "uml", "User-Mode Linux", "uml";
    /// QNX Hypervisor.
    Qnx, Machine, "qnx", "QNX Hypervisor", "qnx";
    /// Jailhouse.
    Jailhouse, Machine, "jailhouse", "Jailhouse", "vm-other";
    /// OpenBSD's vmm.
    OpenBsdVmm, Machine, "openbsd-vmm", "OpenBSD vmm", "vm-other";
    /// NetBSD's NVMM.
    Nvmm, Machine, "nvmm", "NetBSD NVMM", "vm-other";
    /// Intel HAXM.
    Haxm, Machine, "haxm", "Intel HAXM", "vm-other";
    /// kvmtool.
    Kvmtool, Machine, "kvmtool", "kvmtool", "vm-other";
    /// Lockheed Martin's SRE.
    Sre, Machine, "lockheed-sre", "LMHS SRE", "sre";
    /// Unisys s-Par.
    Spar, Machine, "unisys-spar", "Unisys s-Par", "vm-other";
    /// Intel's KGT and eVMM.
    Evmm, Machine, "intel-evmm", "Intel eVMM", "vm-other";
    /// Bochs.
    Bochs, Machine, "bochs", "Bochs", "bochs";
    /// Apple's Virtualization framework.
    Apple, Machine, "apple", "Apple Virtualization", "apple";
    /// IBM PowerVM.
    PowerVm, Machine, "powervm", "IBM PowerVM", "powervm";
    /// IBM z/VM or an LPAR's KVM, by /proc/sysinfo.
    Zvm, Machine, "zvm", "IBM z/VM", "zvm";
    /// Hitachi Virtage.
    Virtage, Machine, "virtage", "Hitachi Virtage", "vm-other";
    /// A hypervisor that has no name here.
    OtherMachine, Machine, "other-machine", "unknown hypervisor", "vm-other";
    /// OpenVZ and Virtuozzo.
    OpenVz, Container, "openvz", "OpenVZ or Virtuozzo", "openvz";
    /// Linux-VServer.
    VServer, Container, "vserver", "Linux-VServer", "none";
    /// Windows Subsystem for Linux, 1 or 2.
    Wsl, Container, "wsl", "Windows Subsystem for Linux", "wsl";
    /// proot.
    Proot, Container, "proot", "proot", "proot";
    /// LXC, also of Proxmox and LXD.
    Lxc, Container, "lxc", "LXC", "lxc";
    /// LXC by libvirt.
    LxcLibvirt, Container, "lxc-libvirt", "LXC by libvirt", "lxc-libvirt";
    /// systemd-nspawn.
    Nspawn, Container, "systemd-nspawn", "systemd-nspawn", "systemd-nspawn";
    /// Docker.
    Docker, Container, "docker", "Docker", "docker";
    /// Podman.
    Podman, Container, "podman", "Podman", "podman";
    /// rkt.
    Rkt, Container, "rkt", "rkt", "rkt";
    /// PouchContainer.
    Pouch, Container, "pouch", "PouchContainer", "pouch";
    /// A Linux zone of illumos or SmartOS.
    IllumosLx, Container, "illumos-lx", "illumos LX zone", "container-other";
    /// Namespaces that nobody put a name to.
    OtherContainer, Container, "other-container", "unknown container", "container-other";
}

/// The kind of Xen domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XenMode {
    /// The control domain.
    Dom0,
    /// Paravirtual: no hardware virtualization.
    Pv,
    /// Hardware virtualization with an emulated PC.
    Hvm,
    /// Hardware virtualization without one.
    Pvh,
}

impl XenMode {
    /// The name: `dom0`, `PV`, `HVM`, `PVH`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dom0 => "dom0",
            Self::Pv => "PV",
            Self::Hvm => "HVM",
            Self::Pvh => "PVH",
        }
    }
}

/// A provider that DMI names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cloud {
    /// Amazon EC2.
    AmazonEc2,
    /// Google Compute Engine.
    Google,
    /// Microsoft Azure.
    Azure,
    /// Oracle Cloud.
    Oracle,
    /// Alibaba Cloud.
    Alibaba,
    /// `DigitalOcean`.
    DigitalOcean,
    /// Hetzner Cloud.
    Hetzner,
    /// An `OpenStack` installation.
    OpenStack,
    /// Nutanix AHV.
    Nutanix,
    /// oVirt and Red Hat Virtualization.
    OVirt,
    /// `KubeVirt`.
    KubeVirt,
}

impl Cloud {
    /// The name for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AmazonEc2 => "Amazon EC2",
            Self::Google => "Google Compute Engine",
            Self::Azure => "Microsoft Azure",
            Self::Oracle => "Oracle Cloud",
            Self::Alibaba => "Alibaba Cloud",
            Self::DigitalOcean => "DigitalOcean",
            Self::Hetzner => "Hetzner Cloud",
            Self::OpenStack => "OpenStack",
            Self::Nutanix => "Nutanix AHV",
            Self::OVirt => "oVirt",
            Self::KubeVirt => "KubeVirt",
        }
    }
}

/// The program that runs the machine, where it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Monitor {
    /// QEMU.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// crosvm.
    Crosvm,
}

impl Monitor {
    /// The name for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::Firecracker => "Firecracker",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Crosvm => "crosvm",
        }
    }
}
