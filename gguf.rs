pub(super) fn write(_: &super::Contents<'_>, _: Option<super::WeightType>, _: &std::path::Path) -> crate::Result<super::Written> { Err(crate::Error::option("--format", "stub")) }
