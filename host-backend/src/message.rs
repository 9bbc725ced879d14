//! What a person is told.
#![forbid(unsafe_code)]

use std::error::Error;

/// An error and its causes, in one line. Many errors name their cause
/// themselves; it is not said twice.
#[must_use]
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !line.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
        source = error.source();
    }
    line
}
