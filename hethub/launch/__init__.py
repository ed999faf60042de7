"""Running a plan: driver, Ray workers, executor, devices real and emulated."""
