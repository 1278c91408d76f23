# Everything runs as root: BPF programs are loaded, namespaces and cgroups are made.
.PHONY: demo test fuzz lint hostile faults soak kernels bench bench-cluster bench-node bench-scale install proto generated requirements

demo: install
	.venv/bin/python -m bench.demo

test: install
	@tools/test

# Made-up input for everything that reads some: rounds of it for so many SECONDS, each other than the one before.
SECONDS ?= 600
fuzz: install
	.venv/bin/python -m tools.fuzz --seconds $(SECONDS)

lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The attacks of tests/kernel/test_hostile.py with more connections than a node takes, and for longer.
hostile: install
	HOSTILE_CONNECTIONS=10000 HOSTILE_SECONDS=10 .venv/bin/pytest -rP tests/kernel/test_hostile.py

bench: install
	.venv/bin/python -m bench.run

# Against kube-apiserver too, where KUBEBUILDER_ASSETS or /usr/local/kubebuilder/bin has one.
bench-cluster: install
	.venv/bin/python -m bench.converge
	.venv/bin/python -m bench.chaos --rounds 100
	if .venv/bin/python -c 'from bench.kubeapi import real_assets as found; raise SystemExit(not found())'; then \
		.venv/bin/python -m bench.converge --real && .venv/bin/python -m bench.chaos --rounds 20 --seed 2 --real; \
	fi
	.venv/bin/python -m bench.cluster_page

# A master in clusters of up to 150,000 pods on 5,000 nodes: some nine minutes.
bench-scale: install
	.venv/bin/python -m bench.scale

# One node with 500 pods: calls a second, memory, what looking at them takes; and its section of docs/benchmarks.md.
bench-node: install
	.venv/bin/python -m bench.node
	.venv/bin/python -m bench.run --report-only

# Everything that may go wrong, one after the other, within the times that docs/faults.md states: some 20 minutes.
# With kube-apiserver too, as bench-cluster, what may happen to that.
faults: install
	.venv/bin/python -m bench.endure
	if .venv/bin/python -c 'from bench.kubeapi import real_assets as found; raise SystemExit(not found())'; then \
		.venv/bin/python -m bench.endure --real --only 'server killed' --only 'server stopped' \
			--only 'server out of reach'; \
	fi
	BPFRL_EVERY_STEP=1 .venv/bin/pytest tests/kernel/test_steps.py

# The same at random, for some time: make soak SECONDS=3600 SEED=7. What was done is in build/soak.log.
SEED ?= 1
soak: install
	.venv/bin/python -m bench.soak --seconds $(SECONDS) --seed $(SEED)

# Boots Debian's kernels in emulated machines, runs tests/kernels/core.py in each, and writes docs/kernels.md: some four
# minutes a kernel.
kernels: install
	@tools/install qemu-system-x86 busybox-static cpio
	.venv/bin/python -m tests.kernels.run

install:
	@tools/install

# After a change of bpfrl/rpc/node.proto.
proto: install
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
		--mypy_out=quiet:. --mypy_grpc_out=quiet:. bpfrl/rpc/node.proto

# After a change of what commands say of themselves, of the annotations, metrics, alerts or the chart: completions/,
# docs/man/, docs/reference.md, docs/metrics.md and deploy/manifests/.
generated: install
	.venv/bin/python -m tools.generated

# After a change of pyproject.toml's dependencies.
requirements: install
	.venv/bin/python -m venv .venv/pip-tools
	.venv/pip-tools/bin/pip install -q pip-tools
	.venv/pip-tools/bin/pip-compile -q --upgrade --generate-hashes --no-emit-index-url --no-emit-trusted-host \
		--no-emit-find-links --no-header --allow-unsafe --strip-extras -o requirements.txt pyproject.toml
	.venv/pip-tools/bin/pip-compile -q --upgrade --generate-hashes --no-emit-index-url --no-emit-trusted-host \
		--no-emit-find-links --no-header --allow-unsafe --strip-extras --extra dev -c requirements.txt \
		-o requirements-dev.txt pyproject.toml
