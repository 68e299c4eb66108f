"""The paper's experiments at three scales, the benchmarks of cost, and the tables and figures of their results."""
