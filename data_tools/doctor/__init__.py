"""Parts of `inspect_shards.py`: a data set checked, surveyed and shown.

examining.py: one data set as a whole
checking.py: samples read again and checked
survey.py: totals, sources, histograms and a verdict
report_page.py: the report as one HTML file
report_samples.py: what the page shows of a sample
step_listing.py: any step of a run, from the plan

May import: building, the root's files, data.format, data.inputs, data.loading, data.plan, data.storage,
training, training.checkpoints, training.recipe.
"""
