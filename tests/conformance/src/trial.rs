use std::{fmt, process::ExitCode};

/// One check with a name.
pub struct Trial {
    name: String,
    run: Box<dyn FnOnce() -> Result<(), Failure> + Send>,
}

/// Why a trial failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    message: String,
}

impl Failure {
    /// A failure with a sentence.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }

    /// What is wrong.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Trial {
    /// A trial.
    pub fn new(name: String, run: impl FnOnce() -> Result<(), Failure> + Send + 'static) -> Self {
        Self { name, run: Box::new(run) }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs it.
    ///
    /// # Errors
    /// What is wrong.
    pub fn run(self) -> Result<(), Failure> {
        (self.run)()
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
            libtest_mimic::Trial::test(trial.name, move || {
                (trial.run)().map_err(|failure| libtest_mimic::Failed::from(failure.message))
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
