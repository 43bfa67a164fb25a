use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
};

use polyattn_api::{Device, device::DeviceChoice};

/// One check with a name.
pub struct Trial {
    name: String,
    run: Box<dyn FnOnce() -> Result<(), Failure> + Send>,
}

/// Why a trial failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    message: String,
    replay: Option<PathBuf>,
}

impl Failure {
    /// A failure with a sentence.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), replay: None }
    }

    /// With the replay file that shows it.
    #[must_use]
    pub fn with_replay(mut self, file: PathBuf) -> Self {
        self.replay = Some(file);
        self
    }

    /// The replay file that shows it.
    #[must_use]
    pub fn replay(&self) -> Option<&Path> {
        self.replay.as_deref()
    }

    /// What is wrong.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.replay {
            Some(file) => write!(f, "\n  polyattn replay {} shows it", file.display()),
            None => Ok(()),
        }
    }
}

impl Trial {
    /// A trial.
    pub fn new(name: String, run: impl FnOnce() -> Result<(), Failure> + Send + 'static) -> Self {
        Self { name, run: Box::new(run) }
    }

    /// Under another name, made from its own.
    #[must_use]
    pub fn named(mut self, name: impl FnOnce(&str) -> String) -> Self {
        self.name = name(&self.name);
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs it. A panic is a failure.
    ///
    /// # Errors
    /// What is wrong.
    pub fn run(self) -> Result<(), Failure> {
        catch_unwind(AssertUnwindSafe(self.run)).unwrap_or_else(|payload| {
            let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
            Err(Failure::new(format!("it panicked: {}", text.unwrap_or_else(|| "no message".into()))))
        })
    }
}

impl fmt::Debug for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trial('{}')", self.name)
    }
}

/// Runs trials as the tests of a target without a harness.
#[must_use]
pub fn run(trials: Vec<Trial>) -> ExitCode {
    let arguments = libtest_mimic::Arguments::from_args();
    let trials = trials
        .into_iter()
        .map(|trial| {
            let name = trial.name.clone();
            libtest_mimic::Trial::test(name, move || trial.run().map_err(|failure| failure.to_string().into()))
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Runs the trials of the chosen ones of `registered`, by name or `all`, on the CPU and on a GPU where there is one.
/// `unknown` is what is said where nobody has the name.
pub(crate) fn run_named<B>(
    registered: &[B],
    name: &str,
    name_of: impl Fn(&B) -> &str,
    unknown: &str,
    suite: impl Fn(&B, &Device) -> Vec<Trial>,
) -> ExitCode {
    let chosen: Vec<_> =
        registered.iter().filter(|one| name == "all" || name_of(one).eq_ignore_ascii_case(name)).collect();
    if chosen.is_empty() {
        eprintln!("{unknown}");
        return ExitCode::from(2);
    }
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    let mut trials = Vec::new();
    for (backend, device) in chosen.iter().flat_map(|backend| devices.iter().map(move |device| (backend, device))) {
        let place = format!("{} on {}: ", name_of(backend), device.facts().name);
        trials.extend(suite(backend, device).into_iter().map(|trial| trial.named(|name| format!("{place}{name}"))));
    }
    run(trials)
}
