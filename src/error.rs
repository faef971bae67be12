//! Why a request is refused.

use std::{error, fmt};

/// Why a request was refused: the HTTP status that says it, and a text that tells a backend
/// developer what to do. Never holds a token, a payload or the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status of the answer, 400 to 503.
    pub status: u16,
    /// One line.
    pub text: String,
}

impl Refusal {
    pub(crate) fn new(status: u16, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { status, text }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl error::Error for Refusal {}
