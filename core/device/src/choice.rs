use std::{convert::Infallible, fmt, str::FromStr};

/// Which device to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceChoice {
    /// The best hardware adapter, else the CPU. A software adapter is never chosen by itself.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The best adapter, software ones included.
    Gpu,
    /// The adapter at this place of [`Device::list`](crate::Device::list).
    Index(usize),
    /// The first adapter whose name contains this, without regard to case.
    Name(String),
}

impl FromStr for DeviceChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "" | "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "gpu" => Self::Gpu,
            other => match other.parse() {
                Ok(index) => Self::Index(index),
                Err(_) => Self::Name(text.to_owned()),
            },
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu => f.write_str("gpu"),
            Self::Index(index) => write!(f, "{index}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceChoice;

    #[test]
    fn parses_names_and_indices() {
        let parse = |text: &str| text.parse::<DeviceChoice>().expect("infallible");
        assert_eq!(parse("AUTO"), DeviceChoice::Auto);
        assert_eq!(parse("Cpu"), DeviceChoice::Cpu);
        assert_eq!(parse("gpu"), DeviceChoice::Gpu);
        assert_eq!(parse("1"), DeviceChoice::Index(1));
        assert_eq!(parse("H100"), DeviceChoice::Name("H100".into()));
    }
}
