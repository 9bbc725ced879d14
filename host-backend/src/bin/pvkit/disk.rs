//! `--disk`: a disk and its options.
#![forbid(unsafe_code)]

use crate::options::split_at_commas;
use pvkit_host::disk::FileOptions;
use pvkit_host::virtio::block::MAX_QUEUES;
use std::path::PathBuf;
use std::str::FromStr;

/// A disk and its options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) path: PathBuf,
    pub(crate) file: FileOptions,
    pub(crate) id: Option<String>,
    pub(crate) bus: Bus,
    pub(crate) queues: Option<u16>,
}

/// How the guest reaches a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    /// virtio-blk over virtio-mmio.
    VirtioMmio,
    /// virtio-blk over virtio-pci.
    VirtioPci,
    /// A drive of the PIIX3 IDE controller.
    Ide,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = split_at_commas(text).into_iter();
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or("the path is missing")?;
        let mut disk = Self {
            path: PathBuf::from(path),
            file: FileOptions::default(),
            id: None,
            bus: Bus::VirtioMmio,
            queues: None,
        };
        for option in parts {
            match option.split_once('=') {
                None if option == "ro" => disk.file.read_only = true,
                None if option == "direct" => disk.file.direct = true,
                Some(("id", id)) if id.len() <= 20 => disk.id = Some(id.to_owned()),
                Some(("id", id)) => {
                    return Err(format!(
                        "the id {id:?} has {} bytes: 20 are possible",
                        id.len()
                    ));
                }
                Some(("bus", "virtio" | "virtio-mmio")) => disk.bus = Bus::VirtioMmio,
                Some(("bus", "virtio-pci")) => disk.bus = Bus::VirtioPci,
                Some(("bus", "ide")) => disk.bus = Bus::Ide,
                Some(("bus", bus)) => {
                    return Err(format!(
                        "there is no bus {bus:?}: virtio-mmio, virtio-pci and ide are"
                    ));
                }
                Some(("queues", count)) => {
                    let number = count.parse().ok();
                    let possible = number.filter(|n| (1..=MAX_QUEUES).contains(n));
                    disk.queues = Some(possible.ok_or_else(|| {
                        format!("{count:?} is no number of queues: 1 to {MAX_QUEUES} are")
                    })?);
                }
                _ => {
                    return Err(format!(
                        "{option:?} is no option: ro, direct, id=TEXT, bus=BUS and queues=COUNT \
                         are (a comma in the path is written twice)"
                    ));
                }
            }
        }
        if disk.bus == Bus::Ide && disk.queues.is_some() {
            return Err("an IDE disk has no queues: leave out queues=COUNT or bus=ide".to_owned());
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let parse = |text: &str| text.parse::<DiskArg>();
        let disk = parse("/a,,b,ro,direct,id=x").unwrap();
        assert_eq!(disk.path, PathBuf::from("/a,b"));
        assert!(disk.file.read_only && disk.file.direct);
        assert_eq!((disk.id.as_deref(), disk.bus), (Some("x"), Bus::VirtioMmio));
        for (name, bus) in [
            ("ide", Bus::Ide),
            ("virtio", Bus::VirtioMmio),
            ("virtio-mmio", Bus::VirtioMmio),
            ("virtio-pci", Bus::VirtioPci),
        ] {
            assert_eq!(parse(&format!("a,bus={name}")).unwrap().bus, bus);
        }
        assert_eq!(parse("a,queues=4").unwrap().queues, Some(4));
        assert_eq!(parse("a").unwrap().queues, None);
        assert_eq!(parse("plain.img").unwrap().file, FileOptions::default());
        for (text, word) in [
            ("", "path"),
            (",ro", "path"),
            ("a,rw", "\"rw\""),
            ("a,id", "\"id\""),
            ("a,ro=1", "\"ro=1\""),
            ("a,bus=scsi", "\"scsi\""),
            ("a,id=123456789012345678901", "21 bytes"),
            ("a,queues", "\"queues\""),
            ("a,queues=0", "1 to 64"),
            ("a,queues=65", "1 to 64"),
            ("a,queues=many", "\"many\""),
            ("a,queues=2,bus=ide", "IDE"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
