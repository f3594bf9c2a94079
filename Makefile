# `make` builds the release binary; `make help` lists the rest.
.DEFAULT_GOAL := build
.NOTPARALLEL:

# Tools that Debian and rustup keep outside some users' PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

TARGET := $(shell uname -m)-unknown-linux-gnu
# How `make build`, `make image` and `make kernels` build; `make test` takes `demo`: see Cargo.toml.
PROFILE = release
BIN     = $(or $(CARGO_TARGET_DIR),target)/$(TARGET)/$(PROFILE)/sidestep

# A fully static glibc binary. The target must be named, or cargo would apply
# the flag to build scripts and proc macros as well.
STATIC_CARGO = RUSTFLAGS='-C target-feature=+crt-static' cargo

# clang-format's output differs between versions; 14 is the one that counts.
CLANG_FORMAT ?= $(shell command -v clang-format-14 || command -v clang-format || echo clang-format-14)
C_FILES       = $(wildcard bpf/*.h bpf/*.c bpf/*/*.h bpf/*/*.c)

# Where cargo puts what it builds for the tests.
DEBUG = $${CARGO_TARGET_DIR:-target}/debug

# What `make test` runs in virtual machines; TEST_KERNELS= leaves them out.
TEST_KERNELS = 6.1
# Which files of tests it runs there: the data path, and what is for there alone. `make kernels` runs all,
# outbound among them, which differs least between kernels and takes six minutes there.
VM_TESTS     = budget inbound unload sockets splice_memory

# How many packages are built before the first of tests/ can run, at most.
PACKAGES     = 235

# Of `make fuzz`, in all. Each target has its seeds in fuzz/seeds and what it found in fuzz/corpus.
SECONDS      = 60
FUZZ_TARGETS = lists annotations manifests

.PHONY: build help deps demo conformance records test torture bench bench-control bench-mesh bench-services kernels check chart image e2e clean-e2e fuzz corpus mutants fmt clean

build: ## build the static release binary (default)
	$(STATIC_CARGO) build --profile $(PROFILE) --target $(TARGET) -p sidestep $$(scripts/libelf.sh)
	@echo "built $(BIN)"

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 13

deps: ## install missing packages and tools for build, tests and demo (root)
	@scripts/deps.sh

# One build for this machine, without the time that the optimizer takes: see [profile.demo].
demo: ## run the demo in namespaces of its own (root); KEEP=1 leaves it running
	@scripts/deps.sh --demo
	cargo build -q --profile demo -p sidestep -p sidestep-lab --bin sidestep --bin demo
	$${CARGO_TARGET_DIR:-target}/demo/demo $(if $(filter-out 0,$(KEEP)),--keep)

conformance: deps ## compare with the meshes' own iptables rules, row by row (root); ARGS="--help"
	@e2e/cluster/parts.sh pilot-agent
	cargo build -q --workspace
	$(DEBUG)/conformance --json $(DEBUG)/../conformance.json $(ARGS)

records: deps ## rewrite lab/records, the rules that Istio's binary installs (root)
	@e2e/cluster/parts.sh pilot-agent
	cargo build -q -p sidestep-conformance
	$(DEBUG)/conformance --record

test: ## deps, check, then all tests, including those against the real kernel (root)
	@[ "$$(id -u)" = 0 ] || { \
		echo "make test: needs root: the tests load eBPF programs and make network namespaces" >&2; \
		exit 1; }
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory check
	@e2e/cluster/parts.sh etcd kube-apiserver kube-proxy
	cargo test --workspace --no-fail-fast
	@$(MAKE) --no-print-directory conformance ARGS=--quiet
	@$(MAKE) --no-print-directory e2e ARGS=--quick PROFILE=demo
	$(DEBUG)/torture --seconds 24
	$(DEBUG)/bench --smoke --out $(DEBUG)/../bench-smoke
	@$(MAKE) --no-print-directory chart
	$(if $(TEST_KERNELS),TESTS='$(VM_TESTS)' PROFILE=demo scripts/kernels.sh $(TEST_KERNELS))

torture: SECONDS = 180
torture: deps build ## checked connections while the agent and pods come and go (root); SECONDS= SEED= ARGS="--help"
	cargo run --release -q -p sidestep-torture -- --sidestep $(abspath $(BIN)) \
		--seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: deps build ## interception and splicing against iptables (root): docs/performance.md; QUICK=1, ARGS="--help"
	cargo run --release -q -p sidestep-bench --bin bench -- \
		--sidestep $(abspath $(BIN)) $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

bench-control: build ## the scale of Kubernetes mode (root): docs/scale.md; QUICK=1, ARGS="--help"
	@e2e/cluster/parts.sh etcd kube-apiserver
	cargo build -q -p sidestep-e2e --bin bench-control
	$(DEBUG)/bench-control --sidestep $(abspath $(BIN)) \
		$(if $(filter-out 0,$(QUICK)),--pods 60 --others 1000 --seconds 15 --rest 5) $(ARGS)

bench-mesh: deps ## HTTP under a real Istio, by its own rules and by Sidestep (root): docs/performance.md; ARGS="--help"
	@e2e/run.sh --bench $(ARGS)

FEW_SERVICES = --services 10,1000 --rounds 3 --calls 500 --changes 20
bench-services: deps build ## calls to Services by the real kube-proxy and by Sidestep (root): docs/services.md; QUICK=1, ARGS="--help"
	@e2e/cluster/parts.sh etcd kube-apiserver kube-proxy
	SIDESTEP_BIN=$(abspath $(BIN)) cargo bench -q -p sidestep-e2e --bench services --profile dev -- \
		--out $(abspath bench-out/services) \
		$(if $(filter-out 0,$(QUICK)),$(FEW_SERVICES)) $(ARGS)

kernels: ## the binary and its tests in VMs with other kernels; KERNELS="6.1" runs one
	@scripts/kernels.sh $(if $(UPDATE_BUDGET),--update-budget) $(KERNELS)

check: ## formatting, lints, licences and the quick unit tests (no root)
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	$(if $(C_FILES),$(CLANG_FORMAT) --dry-run -Werror $(C_FILES))
	shellcheck scripts/*.sh e2e/*.sh e2e/cluster/*.sh e2e/cluster/node/*.sh .ci/run
	scripts/mutants.py --list > /dev/null
	cargo deny --log-level error check bans licenses sources
	scripts/workflows.sh
	scripts/contract.py
	@awk 'FNR == 1 { code = 0 } /^ *```/ { code = !code } length > 110 && !code && !/^(    | *\|)|:\/\// { \
		print "check: " FILENAME ":" FNR ": longer than 110 columns"; wrong = 1 } END { exit wrong }' \
		$$(git ls-files '*.md') >&2
	@packages=$$(cargo tree -p sidestep -e normal,build,dev --prefix none --no-dedupe | sort -u | wc -l); \
	[ "$$packages" -le $(PACKAGES) ] || { \
		echo "check: an integration test needs $$packages packages, more than $(PACKAGES): move it to a package" \
			"of its own, as e2e/tests" >&2; exit 1; }
	cargo clippy -q --workspace --all-targets -- -D warnings
	scripts/bpf-layout.sh
	cargo test -q --workspace --lib --bins

chart: ## lint, render, validate and pack the Helm chart: target/chart
	@scripts/chart.sh

image: build ## a container image as an OCI archive: target/image; takes no docker
	@scripts/image.py $(BIN) $${CARGO_TARGET_DIR:-target}/image

# ENGINE, IP, PROXY, MESH, CONFORMANCE and KEEP reach it by the environment.
e2e: deps ## scenarios in a kind cluster, on any machine (root): e2e/README.md; ENGINE= IP= PROXY= ARGS="--only agent" KEEP=1
	@e2e/run.sh $(ARGS)

clean-e2e: ## remove what a run of `make e2e` left, also one that was killed (root)
	@e2e/cluster/cluster.sh clean

# Without a sanitizer, which a stable compiler does not have: what is fuzzed is safe Rust.
fuzz: ## fuzz the parsers of annotations, lists and manifests; SECONDS=300 for longer
	@scripts/deps.sh --fuzz
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/corpus/$$target; \
		cargo fuzz run -s none $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-dict=fuzz/words.dict -timeout=10 -print_final_stats=1 -verbosity=0 \
			-max_total_time=$$(($(SECONDS) / $(words $(FUZZ_TARGETS)))); \
	done

corpus: ## write Istio's own verdicts on the pods of tests/corpus (root, Go 1.26); ISTIO=VERSION of istio.io/istio
	mkdir -p target
	cd lab/istio-verdicts $(if $(ISTIO),&& go get istio.io/istio@$(ISTIO) && go mod tidy) && \
		go run . < ../../tests/corpus/istio.pods.jsonl > ../../target/istio.verdicts.jsonl
	mv target/istio.verdicts.jsonl tests/corpus/istio.verdicts.jsonl

mutants: ## change each decision of the eBPF programs, and expect a test to fail (root); ONLY=dns.h
	@scripts/deps.sh
	scripts/mutants.py $(if $(ONLY),'$(ONLY)')

fmt: ## format the Rust and the C sources
	cargo fmt --all
	cargo fmt --manifest-path fuzz/Cargo.toml
	$(if $(C_FILES),$(CLANG_FORMAT) -i $(C_FILES))

clean: ## remove everything that was built
	cargo clean
