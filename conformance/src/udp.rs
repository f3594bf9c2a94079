//! A UDP server that says who it is and whom it answers.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

/// How soon it notices that it is to stop.
const TICK: Duration = Duration::from_millis(20);

/// Answers each datagram with `NAME CLIENT`. Stops on drop.
pub struct UdpServer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl UdpServer {
    /// Binds in the namespace, and as the user, of the calling thread. One socket for each
    /// address: the answer must come from the one that was asked.
    pub fn start_here(name: &'static str, listen: &[SocketAddr]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut server = Self { stop, threads: Vec::new() };
        for addr in listen {
            let socket = UdpSocket::bind(addr).with_context(|| format!("binding UDP {addr}"))?;
            socket.set_read_timeout(Some(TICK))?;
            let stop = server.stop.clone();
            let thread = thread::Builder::new().name("udp".to_owned());
            server.threads.push(thread.spawn(move || serve(name, &socket, &stop))?);
        }
        Ok(server)
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("conformance: a UDP server panicked");
            }
        }
    }
}

fn serve(name: &str, socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 512];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((_, client)) => {
                let answer = format!("{name} {client}");
                if let Err(err) = socket.send_to(answer.as_bytes(), client) {
                    eprintln!("conformance: the UDP server {name} answering {client}: {err}");
                }
            }
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // What a client that has gone away leaves on the socket.
            Err(err) if err.kind() == ErrorKind::ConnectionRefused => {}
            Err(err) => return eprintln!("conformance: the UDP server {name}: {err}"),
        }
    }
}
