"""The HTTP server: OpenAI's chat interface over the one model of this process.

limits      the ceilings that hold whatever a request asks for
errors      errors as OpenAI's JSON
protocol    reads chat requests
reply       writes answers
addresses   downloads from public addresses only
media       brings the video of a request into a local file
uploads     the files of /v1/files
partial     the unfinished uploads of /v1/uploads
videos      keeps watched videos on the device, in host memory and on the disk
stops       cuts an answer at a stop text
jobs        a question on its way through the engine
new_video   reads a new video ahead of the engine
engine      the one thread that owns the model
warm_up     compiles what the first questions need
live        live videos, which the engine watches between its other work
live_urls   reads them from addresses, by the rules of downloads
metrics     what /metrics shows
service     what the HTTP interface works with, and its bounded queue
guard       the key, and where a request comes from
bodies      bodies of requests, of bounded size and time
chat        chat requests
files       the requests to /v1/files
live_http   the requests to /v1/live, and the WebSocket of frames
web_page    the page at /
parts       the requests to /v1/uploads
app         the HTTP interface
server      runs it until a signal
batch       answers the lines of a file through it
"""
