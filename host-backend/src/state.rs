//! Saved state of devices: versioned, readable, and validated when it is
//! restored.
//!
//! A device is paused first ([`Stateful::begin_pause`], then
//! [`Stateful::poll_paused`] until it says so): it drains what is in flight and
//! touches neither guest memory nor its back end from then on. It can then be
//! saved, and either resumed or dropped. A fresh device of the same kind and
//! options [restores](Stateful::restore) the state, paused, and is resumed.
#![forbid(unsafe_code)]

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt;
use thiserror::Error;

/// The state of one device.
///
/// ```
/// use pvkit_host::state::SavedState;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Lamp {
///     on: bool,
/// }
///
/// let saved = SavedState::new("lamp", 1, &Lamp { on: true });
/// let text = serde_json::to_string(&saved)?;
/// let lamp: Lamp = serde_json::from_str::<SavedState>(&text)?.open("lamp", 1)?;
/// assert!(lamp.on);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    kind: String,
    version: u32,
    fields: serde_json::Value,
}

/// Why a state cannot be restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It is the state of another kind of device.
    #[error("the saved state is that of `{found}`, not of `{expected}`")]
    Kind {
        /// The device's kind.
        expected: &'static str,
        /// The state's kind.
        found: String,
    },
    /// It was saved by another version of this program.
    #[error("the state of `{kind}` has version {found}; this program restores version {expected}")]
    Version {
        /// The device's kind.
        kind: &'static str,
        /// The version that is supported.
        expected: u32,
        /// The state's version.
        found: u32,
    },
    /// A field is missing, unknown, or of another type.
    #[error("the state of `{kind}` cannot be read: {source}")]
    Fields {
        /// The device's kind.
        kind: &'static str,
        /// The field and its problem.
        source: serde_json::Error,
    },
    /// No device of this kind and options can have reached the state.
    #[error("the state of `{kind}` is not possible here: {source}")]
    Invalid {
        /// The device's kind.
        kind: &'static str,
        /// What is wrong.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl RestoreError {
    /// The state is not possible, for a reason.
    #[must_use]
    pub fn invalid(kind: &'static str, reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Invalid {
            kind,
            source: reason.into(),
        }
    }
}

impl SavedState {
    /// The state `fields` of a device of `kind`, in format `version`.
    #[must_use]
    pub fn new(kind: &'static str, version: u32, fields: &impl Serialize) -> Self {
        // Plain structures with string keys always serialize; anything else
        // could not be restored, which the device's tests show.
        let fields = serde_json::to_value(fields).unwrap_or_default();
        Self {
            kind: kind.to_owned(),
            version,
            fields,
        }
    }

    /// The device's kind.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The fields, if the state is that of a `kind` in format `version`. The
    /// caller validates them.
    ///
    /// # Errors
    /// [`RestoreError`] if it is not, or the fields do not fit `T`.
    pub fn open<T: DeserializeOwned>(
        &self,
        kind: &'static str,
        version: u32,
    ) -> Result<T, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::Kind {
                expected: kind,
                found: self.kind.clone(),
            });
        }
        if self.version != version {
            return Err(RestoreError::Version {
                kind,
                expected: version,
                found: self.version,
            });
        }
        T::deserialize(&self.fields).map_err(|source| RestoreError::Fields { kind, source })
    }
}

/// A device that can be paused, saved and restored.
pub trait Stateful: Send + fmt::Debug {
    /// Begins to pause: nothing new is started.
    fn begin_pause(&mut self) {}

    /// Whether the device is paused, with nothing in flight. Ask again until it
    /// is.
    fn poll_paused(&mut self) -> bool {
        true
    }

    /// Continues after a pause or a restore.
    fn resume(&mut self) {}

    /// The state of a paused device.
    fn save(&self) -> SavedState;

    /// Takes over the state of a paused device, on a fresh one, which is paused
    /// then.
    ///
    /// # Errors
    /// [`RestoreError`] if the state is not one of such a device; the device
    /// must not be used then.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;
}
