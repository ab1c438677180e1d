"""Results, tables and plots. What reads them needs no JAX."""
