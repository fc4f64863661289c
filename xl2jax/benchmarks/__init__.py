"""Benchmarks of video understanding from local files, scored as upstream and as lmms-eval score them.

extraction      the answer in a model's text, by each code base's rules
subtitles       the subtitles that a prompt of Video-MME may hold
task            what a task is; videomme, mlvu, lvbench, longvideobench, charades and synthetic are the tasks
tasks           the tasks by name
released        frames, chunks and windows of upstream's scripts
selection_keys  the keys of upstream's selection files
question_types  scores by type of question, as upstream's script counts them
golden_files    comparison with golden files (`xl2jax eval check`)
dataset         rows and videos in a local folder
records         answers on disk, a line a question
settings        how videos are read; engine is the model as a run uses it
runner          watching each video once and asking its questions
results         scores of a run, with statistics; report, lmms_files and compare present them
lmms_plugin     the model for lmms-eval's own command; lmms_model is the class that it loads
"""
