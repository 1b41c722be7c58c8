"""The parts of ``python benchmarks optimizers/compare``; docs/protocol.md says what they measure and why."""
