//! Directories watched for changes. If the kernel grants no watch, the agent looks at them in every
//! round.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use crate::problem::Problem;

/// The purpose of a watch, for messages.
#[derive(Debug)]
pub struct Watches {
    changed: mpsc::Sender<()>,
    /// The watch; `None` while the kernel has not granted one.
    watched: BTreeMap<PathBuf, Option<RecommendedWatcher>>,
}

impl Watches {
    /// Without watches at first. `changed` gets a message for each change; a second one while the
    /// first is unread is dropped.
    pub fn new(changed: mpsc::Sender<()>) -> Self {
        Self { changed, watched: BTreeMap::new() }
    }

    /// Watches a directory from now on, or as soon as the kernel allows it.
    pub fn add(&mut self, dir: &Path) {
        self.watched.insert(dir.to_owned(), None);
    }

    /// Retries the watches that the kernel refused, and reports those that it still refuses.
    pub fn ensure(&mut self) -> BTreeSet<Problem> {
        let mut problems = BTreeSet::new();
        for (dir, watcher) in &mut self.watched {
            if watcher.is_none() {
                match watch(dir, &self.changed) {
                    Ok(made) => *watcher = Some(made),
                    Err(error) => {
                        problems.insert(Problem::node(explained(dir, &error)));
                    }
                }
            }
        }
        problems
    }
}

fn watch(dir: &Path, changed: &mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let changed = changed.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Reading a file is no change, and the agent itself reads them all.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = changed.try_send(());
        }
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// Which limit is reached, where it is one: inotify's are those of the machine's user, shared with
/// whatever runs there.
fn explained(dir: &Path, error: &notify::Error) -> String {
    let number = match &error.kind {
        notify::ErrorKind::Io(error) => error.raw_os_error(),
        notify::ErrorKind::MaxFilesWatch => Some(libc::ENOSPC),
        _ => None,
    };
    let limit = match number {
        Some(libc::EMFILE) => {
            "; raise the sysctl fs.inotify.max_user_instances, or the agent's limit of open files"
        }
        Some(libc::ENFILE) => "; raise the sysctl fs.file-max",
        Some(libc::ENOSPC) => "; raise the sysctl fs.inotify.max_user_watches",
        _ => "",
    };
    let cause = match number {
        Some(number) => io::Error::from_raw_os_error(number).to_string(),
        None => error.to_string(),
    };
    format!(
        "cannot watch directory {}: {cause}: reading it every few seconds instead{limit}",
        dir.display()
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// F7.
    #[test]
    fn f7_the_limit_that_is_reached_is_named() {
        let io = |number| notify::Error::io(io::Error::from_raw_os_error(number));
        let full = notify::Error::new(notify::ErrorKind::MaxFilesWatch);
        for (error, limit) in [
            (io(libc::EMFILE), "fs.inotify.max_user_instances"),
            (io(libc::ENFILE), "fs.file-max"),
            (io(libc::ENOSPC), "fs.inotify.max_user_watches"),
            (full, "fs.inotify.max_user_watches"),
        ] {
            let text = explained(Path::new("/etc/cni/net.d"), &error);
            assert!(text.contains(limit) && text.contains("/etc/cni/net.d"), "{text}");
        }
    }

    /// F7: a directory that cannot be watched is a problem until it can be.
    #[tokio::test]
    async fn f7_a_directory_is_watched_as_soon_as_it_can_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("net.d");
        let (changed, mut changes) = mpsc::channel(1);
        let mut watches = Watches::new(changed);
        watches.add(&path);
        assert_eq!(watches.ensure().len(), 1);
        fs::create_dir(&path).expect("made");
        assert_eq!(watches.ensure(), BTreeSet::new());
        fs::write(path.join("a"), "text").expect("written");
        changes.recv().await.expect("told");
    }
}
