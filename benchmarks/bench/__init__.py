"""What the benchmarks share: result files, worker pools, CPU quotas, torch's own engines."""
