"""Pages of HTML that stand alone: of one run, and of several."""
