"""The test bed, the demonstration and the benchmarks."""
