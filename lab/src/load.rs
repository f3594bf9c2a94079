//! Load for comparisons: requests and responses against a [`crate::Talk::Echo`] server.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, ensure};
use hdrhistogram::Histogram;

use crate::client::connect;
use crate::pod::Pod;
use crate::wait::interrupted;

/// What to do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Connect once, then one request after the other.
    KeepAlive,
    /// A connection for each request.
    Connect,
}

/// The settings of a load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOpts {
    /// Clients at the same time, each a thread.
    pub connections: usize,
    /// The limit that ends the load.
    pub duration: Duration,
    /// Bytes of a request and of its response.
    pub payload: usize,
    /// What to do with a connection.
    pub mode: Mode,
}

impl Default for LoadOpts {
    fn default() -> Self {
        let duration = Duration::from_secs(1);
        Self { connections: 16, duration, payload: 64, mode: Mode::KeepAlive }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Responses that came in full.
    pub requests: u64,
    /// Responses per second.
    pub rps: f64,
    /// Half of the requests took no longer (connecting included, with [`Mode::Connect`]).
    pub p50: Duration,
    /// 99 of 100 requests took no longer.
    pub p99: Duration,
    /// Failed connections and requests.
    pub errors: u64,
    /// The first failure of some client.
    pub first_error: Option<String>,
}

/// Runs load from the pod as `uid` (and the same gid) until `opts.duration` is over; a request
/// that hangs ends it three seconds later at most.
pub fn run(pod: &Pod, uid: u32, target: SocketAddr, opts: LoadOpts) -> Result<Report> {
    ensure!(opts.connections > 0 && opts.payload > 0, "load of nothing");
    let (clients, took) = pod.run(uid, uid, || {
        let barrier = Barrier::new(opts.connections + 1);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..opts.connections)
                .map(|_| scope.spawn(|| Client::new(target, opts).run(&barrier)))
                .collect();
            barrier.wait();
            let start = Instant::now();
            let clients: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            (clients, start.elapsed())
        })
    })?;
    let mut times = histogram();
    let (mut errors, mut first_error) = (0, None);
    for client in clients {
        let client = client.map_err(|_| Error::msg("a client panicked"))?;
        times.add(&client.times).context("adding up the clients")?;
        errors += client.errors;
        first_error = first_error.or(client.first_error);
    }
    let requests = times.len();
    Ok(Report {
        requests,
        rps: requests as f64 / took.as_secs_f64(),
        p50: Duration::from_nanos(times.value_at_quantile(0.5)),
        p99: Duration::from_nanos(times.value_at_quantile(0.99)),
        errors,
        first_error,
    })
}

/// Nanoseconds up to a minute, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(60_000_000_000, 3).expect("these are valid bounds")
}

struct Client {
    target: SocketAddr,
    opts: LoadOpts,
    times: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
}

impl Client {
    fn new(target: SocketAddr, opts: LoadOpts) -> Self {
        Self { target, opts, times: histogram(), errors: 0, first_error: None }
    }

    fn run(mut self, barrier: &Barrier) -> Self {
        let request = vec![b'x'; self.opts.payload];
        let mut response = vec![0; self.opts.payload];
        let mut stream = match self.opts.mode {
            Mode::KeepAlive => self.open(),
            Mode::Connect => None,
        };
        barrier.wait();
        let start = Instant::now();
        while start.elapsed() < self.opts.duration && !interrupted() {
            let begin = Instant::now();
            let Some(mut open) = stream.take().or_else(|| self.open()) else {
                thread::yield_now(); // refused, perhaps: let the others run
                continue;
            };
            match open.write_all(&request).and_then(|()| open.read_exact(&mut response)) {
                Ok(()) => self.record(begin.elapsed()),
                Err(err) => {
                    self.failed(&err.into());
                    continue;
                }
            }
            if self.opts.mode == Mode::KeepAlive {
                stream = Some(open);
            }
        }
        self
    }

    fn record(&mut self, took: Duration) {
        self.times.saturating_record(took.as_nanos().try_into().unwrap_or(u64::MAX));
    }

    fn open(&mut self) -> Option<TcpStream> {
        let stream = connect(self.target, None)
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream).map_err(Error::from));
        stream.inspect_err(|err| self.failed(err)).ok()
    }

    fn failed(&mut self, err: &Error) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| format!("{err:#}"));
    }
}
