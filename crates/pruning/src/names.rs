//! Enums that are written as words on a command line and in files.

/// `FromStr`, `Display` and the list of all words of an enum.
macro_rules! named {
    ($type:ty, $($name:literal => $value:expr),* $(,)?) => {
        impl $type {
            /// All values, in the order of the documentation.
            pub const ALL: &'static [$type] = &[$($value),*];
        }
        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> std::result::Result<Self, String> {
                match text { $($name => Ok($value),)* other => Err(format!("expected {}, found {other:?}", [$($name),*].join(", "))) }
            }
        }
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                $(if *self == $value { return f.pad($name); })*
                Ok(())
            }
        }
    };
}
pub(crate) use named;
