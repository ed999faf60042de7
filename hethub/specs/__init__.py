"""The files that people write, checked and resolved: cluster, workload, job, plan."""
