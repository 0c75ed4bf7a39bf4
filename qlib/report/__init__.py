"""Tables, summaries and plots of models and runs."""
