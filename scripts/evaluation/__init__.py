"""What scripts/evaluate.py scores with.

questions.py: held-out samples as questions in the prompts of training
engines.py: the model folder, asked in batches: stock transformers or vLLM
metrics.py: metrics of a user's own questions
published.py: published scores, noise and the Markdown row; the table is published.json
scores.py: the folder of scores
answers.py: answers that were given already
run.py: a model scored by lmms-eval
tasks.py: lmms-eval's tasks, and a user's own questions as one
model.py: the model that lmms-eval asks
vlmevalkit.py: a model for VLMEvalKit
"""
