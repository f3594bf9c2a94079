//! What the programs cost the kernel's verifier: no program may grow unnoticed towards a limit
//! of some kernel. The counts are kept in `bpf/budget.txt`.

mod common;

use std::{collections::BTreeMap, process::Command};

use common::*;

/// Program -> verified instructions, as `scripts/kernels.sh --update-budget` left them.
fn budget() -> BTreeMap<&'static str, u64> {
    include_str!("../bpf/budget.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (program, count) = line.split_once(' ').expect("NAME COUNT");
            (program, count.trim().parse().expect("a number"))
        })
        .collect()
}

#[test]
fn no_program_grows_by_half() {
    let output = Command::new(binary()).args(["check", "--output", "json"]).output().expect("runs");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["ok"], true, "{report}");
    let mut budget = budget();
    let mut over = Vec::new();
    println!(); // the test runner left the line open
    for program in report["programs"].as_array().expect("programs") {
        let name = program["name"].as_str().expect("a name");
        let allowed = budget.remove(name);
        let Some(verified) = program["verified"].as_u64() else {
            println!("{name}: this kernel does not tell, or does without it");
            continue;
        };
        // scripts/kernels.sh reads these lines.
        println!("verified {name} {verified}");
        if allowed.is_none_or(|allowed| verified * 2 > allowed * 3) {
            over.push(format!("{name}: {verified} instructions, budget {allowed:?}"));
        }
    }
    let update = "`make kernels UPDATE_BUDGET=1` writes bpf/budget.txt anew";
    assert!(over.is_empty(), "over by half: {over:?}; if that is meant, {update}");
    assert!(budget.is_empty(), "in the budget, but no program: {budget:?}; {update}");
}
