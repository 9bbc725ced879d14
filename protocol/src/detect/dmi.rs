//! Names in the DMI (SMBIOS) tables.

use super::platform::{Cloud, Monitor, Platform};
use super::{Source, Text};

/// A DMI string, by the name of its file under Linux'
/// `/sys/class/dmi/id` (SMBIOS 3.6 §7.1 to §7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DmiField {
    /// System Information, Manufacturer.
    SystemVendor,
    /// System Information, Product Name.
    ProductName,
    /// System Information, Version.
    ProductVersion,
    /// Baseboard Information, Manufacturer.
    BoardVendor,
    /// BIOS Information, Vendor.
    BiosVendor,
    /// BIOS Information, BIOS Version.
    BiosVersion,
    /// System Enclosure, Asset Tag Number.
    ChassisAssetTag,
}

impl DmiField {
    /// Every field.
    pub const ALL: [Self; 7] = [
        Self::SystemVendor,
        Self::ProductName,
        Self::ProductVersion,
        Self::BoardVendor,
        Self::BiosVendor,
        Self::BiosVersion,
        Self::ChassisAssetTag,
    ];

    /// The name of the file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SystemVendor => "sys_vendor",
            Self::ProductName => "product_name",
            Self::ProductVersion => "product_version",
            Self::BoardVendor => "board_vendor",
            Self::BiosVendor => "bios_vendor",
            Self::BiosVersion => "bios_version",
            Self::ChassisAssetTag => "chassis_asset_tag",
        }
    }
}

use DmiField::{
    BiosVendor, BiosVersion, BoardVendor, ChassisAssetTag, ProductName, ProductVersion,
    SystemVendor,
};

const ANY: &[DmiField] = &[
    ProductName,
    SystemVendor,
    BoardVendor,
    BiosVendor,
    ProductVersion,
];
const VENDORS: &[DmiField] = &[SystemVendor, BoardVendor, BiosVendor];

/// Prefixes and what they mean. Order matters: what is more special comes
/// first (a VirtualBox may show KVM's or Hyper-V's interface, and a provider's
/// machine may also say QEMU).
const MACHINES: &[(&[DmiField], &str, Platform)] = &[
    (ANY, "VirtualBox", Platform::VirtualBox),
    (VENDORS, "innotek GmbH", Platform::VirtualBox),
    (ANY, "VMware", Platform::VMware),
    (VENDORS, "VMW", Platform::VMware),
    (ANY, "Parallels", Platform::Parallels),
    (ANY, "Xen", Platform::Xen),
    (ANY, "BHYVE", Platform::Bhyve),
    (ANY, "Bochs", Platform::Bochs),
    (ANY, "Apple Virtualization", Platform::Apple),
    (&[ProductVersion], "Hyper-V", Platform::HyperV),
    (&[BiosVersion], "Hyper-V", Platform::HyperV),
    (ANY, "KVM", Platform::Kvm),
    (ANY, "OpenStack", Platform::Kvm),
    (ANY, "KubeVirt", Platform::Kvm),
    (ANY, "Google Compute Engine", Platform::Kvm),
    (ANY, "Cloud Hypervisor", Platform::Kvm),
    (&[ProductName], "crosvm", Platform::Kvm),
    (VENDORS, "QEMU", Platform::Qemu),
];

const CLOUDS: &[(&[DmiField], &str, Cloud)] = &[
    (VENDORS, "Amazon EC2", Cloud::AmazonEc2),
    (ANY, "Google", Cloud::Google),
    (
        &[ChassisAssetTag],
        // Fixed by Azure for all its machines.
        "7783-7084-3265-9085-8269-3286-77",
        Cloud::Azure,
    ),
    (&[ChassisAssetTag], "OracleCloud.com", Cloud::Oracle),
    (ANY, "Alibaba", Cloud::Alibaba),
    (VENDORS, "DigitalOcean", Cloud::DigitalOcean),
    (VENDORS, "Hetzner", Cloud::Hetzner),
    (ANY, "OpenStack", Cloud::OpenStack),
    (ANY, "Nutanix", Cloud::Nutanix),
    (ANY, "AHV", Cloud::Nutanix),
    (ANY, "oVirt", Cloud::OVirt),
    (ANY, "RHEV", Cloud::OVirt),
    (ANY, "KubeVirt", Cloud::KubeVirt),
];

const MONITORS: &[(&[DmiField], &str, Monitor)] = &[
    (VENDORS, "QEMU", Monitor::Qemu),
    (ANY, "Cloud Hypervisor", Monitor::CloudHypervisor),
    (&[ProductName], "crosvm", Monitor::Crosvm),
];

/// OEM identifiers of ACPI tables (ACPI 6.5 §5.2.6), for monitors without DMI.
const ACPI_OEMS: &[(&[u8; 6], Monitor)] = &[
    (b"FIRECK", Monitor::Firecracker),
    (b"CLOUDH", Monitor::CloudHypervisor),
    (b"CROSVM", Monitor::Crosvm),
    (b"BOCHS ", Monitor::Qemu),
];

/// Bytes of a string that are looked at. Seven are on the stack at once, which
/// in a kernel is small.
const STRING_BYTES: usize = 64;

/// What the tables name.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) machine: Option<(Platform, DmiField)>,
    pub(super) cloud: Option<Cloud>,
    pub(super) monitor: Option<Monitor>,
    /// A server that is rented whole: a provider's name, and no hypervisor.
    pub(super) bare_metal: bool,
}

impl Names {
    pub(super) fn read(source: &dyn Source) -> Self {
        let texts =
            DmiField::ALL.map(|field| Text::<STRING_BYTES>::read(|into| source.dmi(field, into)));
        let find = |fields: &[DmiField], prefix: &str| -> Option<DmiField> {
            fields.iter().copied().find(|field| {
                let text = &texts[*field as usize];
                text.as_ref().is_some_and(|text| text.starts_with(prefix))
            })
        };
        let named = MACHINES
            .iter()
            .find_map(|(fields, prefix, platform)| Some((*platform, find(fields, prefix)?)));
        let virtual_pc = || {
            // Hyper-V says the same, and has leaves besides.
            find(&[SystemVendor], "Microsoft Corporation")?;
            Some((
                Platform::VirtualPc,
                find(&[ProductName], "Virtual Machine")?,
            ))
        };
        let cloud = CLOUDS
            .iter()
            .find_map(|(fields, prefix, cloud)| find(fields, prefix).map(|_| *cloud));
        let monitor = MONITORS
            .iter()
            .find_map(|(fields, prefix, monitor)| find(fields, prefix).map(|_| *monitor));
        let product = &texts[ProductName as usize];
        Self {
            machine: named.or_else(virtual_pc),
            cloud,
            monitor: monitor.or_else(|| acpi_monitor(source)),
            bare_metal: cloud == Some(Cloud::AmazonEc2)
                && product.as_ref().is_some_and(|text| text.contains(".metal")),
        }
    }
}

fn acpi_monitor(source: &dyn Source) -> Option<Monitor> {
    // The table that every machine with ACPI has. Its header: signature,
    // length, revision, checksum, and then the identifier.
    let table = Text::file(source, "/sys/firmware/acpi/tables/FACP")?;
    let oem = table.bytes[..table.length].get(10..16)?;
    ACPI_OEMS
        .iter()
        .find(|(name, _)| *name == oem)
        .map(|(_, monitor)| *monitor)
}
