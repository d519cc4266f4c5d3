"""The browser front end: `veneer studio`. Views over services over jobs; only a job's worker loads torch."""
