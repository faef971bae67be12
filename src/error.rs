//! Why a request is refused, and which status says so.

use std::{error, fmt};

/// Why a request, an event or a token was refused: the HTTP status that says it, and a text that
/// tells a backend developer what to do. Never holds a token or the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status of the answer, 400 to 505.
    pub status: u16,
    /// One line, for the sender and for the log: it quotes nothing that came. For 405, the methods
    /// that the path takes.
    pub text: String,
    /// A token was authentic, and is too old.
    pub(crate) expired: bool,
}

impl Refusal {
    pub(crate) fn new(status: u16, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
            expired: false,
        }
    }
}

/// Refuses, unless something holds.
pub(crate) fn ensure(holds: bool, status: u16, text: &str) -> Result<(), Refusal> {
    holds
        .then_some(())
        .ok_or_else(|| Refusal::new(status, text))
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl error::Error for Refusal {}
