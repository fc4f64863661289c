"""From a video to answers, in the order in which the modules are used.

layout           positions and slots of tokens, and what each query sees
cache            the KV cache
prefill          the video goes through the LLM into the cache, step by step
relevance        how much each group of frames matters to a question
bilevel          chunks that matter stay dense, and all others are pooled
generate         runs the question behind the cache and decodes the answer
network          config and parameters as the compiled programs take them
compiled         all of the above as compiled programs
session          the one driver of these programs; api, verify, needle and the benchmarks call it
selection        which chunks a question reads
selection_files  reads upstream's selection files
video_cache      a watched video
watching         a video that is being watched, a segment at a time
live             a video that is watched as it comes, in memory of a fixed size
live_sizes       how much it keeps, and whether that fits
live_arena       its KV on the device
live_ledger      which of its groups are where
live_blocks      the dense KV that left the device, in host memory and on the disk
decoding         answers that are decoded alone or together
answering        an answer in the making, a few tokens at a time
store            keeps its cache in a file
offload          keeps its cache in host memory
progress         seconds by stage, and the pieces of an answer
timeline         plots which chunks an answer read
memory, flops    the memory and the operations that a video needs
api              the Python interface
"""
