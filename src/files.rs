//! Reads files named by others, which may be of any kind.

use std::{
    fs::{File, FileType, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

/// The maximum size of a configuration or manifest.
const LONGEST: u64 = 16 << 20;

/// Opens a file for reading that must be a regular one. Any other kind is refused without waiting:
/// a FIFO would block the agent until somebody writes to it.
///
/// # Errors
/// As [`File::open`]; names the kind if it is not a regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let text = format!("it is {}, not a regular file", name(kind));
    Err(io::Error::new(ErrorKind::InvalidInput, text))
}

/// Reads all of a regular file.
///
/// # Errors
/// As [`open`]; if the file is not UTF-8, or too long.
pub fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.take(LONGEST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LONGEST {
        let text = format!("it is larger than {} MiB", LONGEST >> 20);
        return Err(io::Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(text)
}

fn name(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    /// F34: reading any of these would block, or never end.
    #[test]
    fn f34_what_is_no_regular_file_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let [fifo, socket] = ["fifo", "socket"].map(|name| dir.path().join(name));
        mkfifo(&fifo, Mode::S_IRWXU).expect("made");
        let _listener = UnixListener::bind(&socket).expect("bound");
        let endless = Path::new("/dev/zero");
        for (path, word) in [(&*fifo, "FIFO"), (dir.path(), "directory"), (endless, "device")] {
            let error = read(path).expect_err("refused").to_string();
            assert!(error.contains(word) && error.contains("regular"), "{error}");
        }
        read(&socket).expect_err("a socket cannot even be opened");
        let long = dir.path().join("long");
        File::create(&long).and_then(|file| file.set_len(LONGEST + 1)).expect("made");
        assert!(read(&long).expect_err("refused").to_string().contains("16 MiB"));
        fs::write(&long, "text").expect("written");
        assert_eq!(read(&long).expect("read"), "text");
    }
}
