//! Small guests made byte by byte, and how to skip loudly.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use std::io::Write;
use std::path::{Path, PathBuf};

/// Says why a check is skipped, also when the test's output is captured.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr().lock(), "skipped: {why}");
}

/// Whether virtual machines can be made here.
pub fn have_kvm() -> bool {
    let have = kvm_ioctls::Kvm::new().is_ok();
    if !have {
        skipped("/dev/kvm cannot be opened");
    }
    have
}

/// Where guests are loaded.
pub const LOAD_ADDR: u32 = 0x10_0000;

/// An ELF image that runs `code` in 32-bit protected mode, paging off.
pub fn elf(code: &[u8]) -> Vec<u8> {
    elf_with(code, true, 0)
}

/// The same, with or without the PVH note, and with `extra` bytes of zeroed
/// memory behind the code.
pub fn elf_with(code: &[u8], note: bool, extra: u64) -> Vec<u8> {
    let headers = 64 + 2 * 56;
    let note_at = headers as u64;
    let note_bytes = 4 * 4 + 4;
    let code_at = note_at + note_bytes;
    let mut image = Vec::new();
    let word = |image: &mut Vec<u8>, value: u64| image.extend(value.to_le_bytes());
    let half = |image: &mut Vec<u8>, value: u32| image.extend(value.to_le_bytes());
    let short = |image: &mut Vec<u8>, value: u16| image.extend(value.to_le_bytes());

    image.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    short(&mut image, 2); // ET_EXEC
    short(&mut image, 62); // EM_X86_64
    half(&mut image, 1);
    word(&mut image, u64::from(LOAD_ADDR)); // entry
    word(&mut image, 64); // program headers
    word(&mut image, 0);
    half(&mut image, 0);
    short(&mut image, 64);
    short(&mut image, 56);
    short(&mut image, 2);
    short(&mut image, 64);
    short(&mut image, 0);
    short(&mut image, 0);

    let mut header = |kind: u32, offset: u64, size: u64, memory: u64| {
        half(&mut image, kind);
        half(&mut image, 7);
        word(&mut image, offset);
        word(&mut image, u64::from(LOAD_ADDR));
        word(&mut image, u64::from(LOAD_ADDR));
        word(&mut image, size);
        word(&mut image, memory);
        word(&mut image, 4);
    };
    let len = code.len() as u64;
    header(1, code_at, len, len + extra); // PT_LOAD
    header(if note { 4 } else { 0 }, note_at, note_bytes, note_bytes); // PT_NOTE

    half(&mut image, 4);
    half(&mut image, 4);
    half(&mut image, 18); // XEN_ELFNOTE_PHYS32_ENTRY
    image.extend(*b"Xen\0");
    half(&mut image, LOAD_ADDR);
    image.extend(code);
    image
}

/// Writes a file into `directory`.
pub fn write(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Machine code, put together instruction by instruction.
#[derive(Default, Clone)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov dword [address], value`
    pub fn store(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xc7, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&value.to_le_bytes())
    }

    /// `mov word [address], value`
    pub fn store16(self, address: u32, value: u16) -> Self {
        self.bytes(&[0x66, 0xc7, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&value.to_le_bytes())
    }

    /// `mov byte [address], value`
    pub fn store8(self, address: u32, value: u8) -> Self {
        self.bytes(&[0xc6, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&[value])
    }

    /// `mov eax, [address]`
    pub fn load(self, address: u32) -> Self {
        self.bytes(&[0xa1]).bytes(&address.to_le_bytes())
    }

    /// `cmp byte [address], value`, until it differs
    pub fn wait_while8(self, address: u32, value: u8) -> Self {
        self.bytes(&[0x80, 0x3d])
            .bytes(&address.to_le_bytes())
            .bytes(&[value, 0x74, 0xf7])
    }

    /// `mov al, value; mov dx, port; out dx, al`
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.bytes(&[0xb0, value, 0x66, 0xba])
            .bytes(&port.to_le_bytes())
            .bytes(&[0xee])
    }

    /// `mov eax, value; mov dx, port; out dx, eax`
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.bytes(&[0xb8])
            .bytes(&value.to_le_bytes())
            .bytes(&[0x66, 0xba])
            .bytes(&port.to_le_bytes())
            .bytes(&[0xef])
    }

    /// `mov edi, address; mov ecx, count; mov dx, port; rep insw`
    pub fn rep_insw(self, port: u16, address: u32, count: u32) -> Self {
        self.bytes(&[0xbf])
            .bytes(&address.to_le_bytes())
            .bytes(&[0xb9])
            .bytes(&count.to_le_bytes())
            .bytes(&[0x66, 0xba])
            .bytes(&port.to_le_bytes())
            .bytes(&[0x66, 0xf3, 0x6d])
    }

    /// Writes the low byte of `[address]` to the debug exit port.
    pub fn exit_with(self, address: u32) -> Self {
        self.load(address).bytes(&[0xe6, 0xf4]).forever()
    }

    /// Writes the byte that a port reads as to the debug exit port.
    pub fn exit_with_port(self, port: u16) -> Self {
        // mov dx, port; in al, dx
        self.bytes(&[0x66, 0xba])
            .bytes(&port.to_le_bytes())
            .bytes(&[0xec, 0xe6, 0xf4])
            .forever()
    }

    /// `mov edi, address; l: cmp dword [edi], value; jne l`
    pub fn wait_for(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xbf])
            .bytes(&address.to_le_bytes())
            .bytes(&[0x81, 0x3f])
            .bytes(&value.to_le_bytes())
            .bytes(&[0x75, 0xf8])
    }

    /// Reads a port until one of the bits of `mask` is set.
    pub fn wait_for_port(self, port: u16, mask: u8) -> Self {
        // mov dx, port; l: in al, dx; test al, mask; jz l
        self.bytes(&[0x66, 0xba])
            .bytes(&port.to_le_bytes())
            .bytes(&[0xec, 0xa8, mask, 0x74, 0xfb])
    }

    /// Ends the machine.
    pub fn exit(self, code: u8) -> Self {
        self.bytes(&[0xb0, code, 0xe6, 0xf4]).forever()
    }

    /// `cli; hlt`, for ever.
    pub fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfc])
    }

    /// `jmp $`
    pub fn forever(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// An exception with no table to handle it: `lidt` of zeros, `int3`.
    pub fn triple_fault(self) -> Self {
        // The zeros at 0x500 are memory that nobody wrote.
        self.bytes(&[0x0f, 0x01, 0x1d])
            .bytes(&0x500u32.to_le_bytes())
            .bytes(&[0xcc])
    }
}
