"""What a memory of some size will take, before it is made: bytes, memory, hours, workers.

workload        what is asked for
worker_types    machines
calibration     what things cost, measured
estimates       the formulas: from these three to stages
planner         stages on machines: times, workers for a deadline
summary         a plan for the terminal, and as JSON
dataflow_options    a plan as options of Dataflow
"""
