//! What benchmarks make of their samples: median, spread and plots.
#![forbid(unsafe_code)]

mod plot;
mod spread;

pub use plot::{Bars, Line, Plot, Style, load_font};
pub use spread::Spread;
