//! Which commands the drives know.
#![forbid(unsafe_code)]

use pvkit_protocol::emulated::ata::command;

/// How the data of a command moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// PIO, one sector a block.
    Sectors,
    /// PIO, as many sectors a block as SET MULTIPLE MODE said.
    Multiple,
    /// Through the bus master.
    Dma,
}

/// A command. `ext` forms have addresses of 48 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Transfer {
        write: bool,
        how: How,
        ext: bool,
    },
    Verify {
        ext: bool,
    },
    NativeMax {
        ext: bool,
    },
    Flush,
    Identify,
    IdentifyPacket,
    SetFeatures,
    SetMultiple,
    SetGeometry,
    Diagnose,
    PowerMode,
    /// Succeeds: a drive without heads and motor has nothing to do.
    Nothing,
}

impl Command {
    /// What a code means; `None` for those that are aborted.
    pub(super) fn decode(code: u8) -> Option<Self> {
        let transfer = |write, how, ext| Some(Self::Transfer { write, how, ext });
        match code {
            command::READ_SECTORS => transfer(false, How::Sectors, false),
            command::READ_SECTORS_EXT => transfer(false, How::Sectors, true),
            command::WRITE_SECTORS => transfer(true, How::Sectors, false),
            command::WRITE_SECTORS_EXT => transfer(true, How::Sectors, true),
            command::READ_MULTIPLE => transfer(false, How::Multiple, false),
            command::READ_MULTIPLE_EXT => transfer(false, How::Multiple, true),
            command::WRITE_MULTIPLE => transfer(true, How::Multiple, false),
            command::WRITE_MULTIPLE_EXT => transfer(true, How::Multiple, true),
            command::READ_DMA => transfer(false, How::Dma, false),
            command::READ_DMA_EXT => transfer(false, How::Dma, true),
            command::WRITE_DMA => transfer(true, How::Dma, false),
            command::WRITE_DMA_EXT => transfer(true, How::Dma, true),
            command::READ_VERIFY_SECTORS => Some(Self::Verify { ext: false }),
            command::READ_VERIFY_SECTORS_EXT => Some(Self::Verify { ext: true }),
            command::READ_NATIVE_MAX_ADDRESS => Some(Self::NativeMax { ext: false }),
            command::READ_NATIVE_MAX_ADDRESS_EXT => Some(Self::NativeMax { ext: true }),
            command::FLUSH_CACHE | command::FLUSH_CACHE_EXT => Some(Self::Flush),
            command::IDENTIFY_DEVICE => Some(Self::Identify),
            command::IDENTIFY_PACKET_DEVICE => Some(Self::IdentifyPacket),
            command::SET_FEATURES => Some(Self::SetFeatures),
            command::SET_MULTIPLE_MODE => Some(Self::SetMultiple),
            command::INITIALIZE_DEVICE_PARAMETERS => Some(Self::SetGeometry),
            command::EXECUTE_DEVICE_DIAGNOSTIC => Some(Self::Diagnose),
            command::CHECK_POWER_MODE => Some(Self::PowerMode),
            command::RECALIBRATE
            | command::STANDBY_IMMEDIATE
            | command::IDLE_IMMEDIATE
            | command::STANDBY
            | command::IDLE
            | command::SLEEP => Some(Self::Nothing),
            _ => None,
        }
    }
}
