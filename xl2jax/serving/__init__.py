"""The HTTP server: OpenAI's chat interface over the one model of this process.

limits      the ceilings that hold whatever a request asks for
errors      errors as OpenAI's JSON
protocol    reads requests, and writes answers
addresses   downloads from public addresses only
media       brings the video of a request into a local file
uploads     the files of /v1/files
videos      keeps watched videos on the device, in host memory and on the disk
stops       cuts an answer at a stop text
engine      the one thread that owns the model
metrics     what /metrics shows
app         the HTTP interface
server      runs it until a signal
"""
