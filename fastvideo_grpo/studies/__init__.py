"""The paper's comparisons on the tiny models: what is compared, the runs, their statistics, the pages."""
