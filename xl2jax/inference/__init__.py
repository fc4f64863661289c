"""From a video to answers, in the order in which the modules are used.

layout        where every token stands, and what each query sees
cache         the KV cache
prefill       the video goes into the cache, chunk by chunk
relevance     how much each group of frames matters to a question
bilevel       chunks that matter stay dense, all others are pooled
generate      the question behind the cache, and the tokens of the answer
compiled      all of the above as compiled programs
session       the one driver of these programs; api, verify, needle and the benchmarks call it
selection     which chunks a question reads
video_cache   a watched video
store         its cache in a file
offload       its cache in host memory
memory, flops what it costs
api           the Python interface
"""
