"""From a command line to running workers: arguments, devices, the plan, the processes. Free of torch."""
