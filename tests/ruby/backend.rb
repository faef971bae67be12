# The backend's side of sse-server in Ruby. On Debian: apt install ruby ruby-msgpack ruby-rbnacl
# (elsewhere: gem install msgpack rbnacl webrick, and libsodium).
# To try it: SSE_SECRET=… ruby backend.rb
require "msgpack"
require "net/http"
require "rbnacl"
require "webrick"

PUSH_URL = ENV.fetch("PUSH_URL", "http://127.0.0.1:8000") # as this backend reaches it
PUSH_PUBLIC_URL = ENV.fetch("PUSH_PUBLIC_URL", PUSH_URL) # as browsers reach it
# The first of the secrets. 64 digits stand for 32 bytes.
KEY = [ENV.fetch("SSE_SECRET").split(",")[0].strip].pack("H*")
CIPHER = RbNaCl::AEAD::XChaCha20Poly1305IETF.new(KEY)
BASE62 = [*"0".."9", *"A".."Z", *"a".."z"]

# A Branca token: XChaCha20-Poly1305 in base62.
def mint(payload)
  nonce = RbNaCl::Random.random_bytes(24)
  head = [0xBA, Time.now.to_i].pack("CN") + nonce
  sealed = CIPHER.encrypt(nonce, payload.to_msgpack, head)
  (head + sealed).unpack1("H*").hex.digits(62).reverse.map { |digit| BASE62[digit] }.join
end

# Where to send a browser that may read these topics.
def events_url(*topics)
  "#{PUSH_PUBLIC_URL}/events?token=#{mint("topics" => topics)}"
end

# Delivers all of the events, in order, or none: publish({ topic:, event:, data: }, …)
def publish(*events)
  url = URI("#{PUSH_URL}/submit")
  options = { use_ssl: url.scheme == "https", open_timeout: 5, read_timeout: 5 }
  body = mint("events" => events)
  answer = Net::HTTP.start(url.host, url.port, options) { |http| http.post(url.path, body) }
  raise "#{answer.code} #{answer.body}" unless answer.code == "200"
  answer.body # {"events": …, "deliveries": …}
end

# An application that uses both: GET /events to listen, POST /news to tell everyone.
server = WEBrick::HTTPServer.new(BindAddress: "127.0.0.1", Port: ENV.fetch("PORT", 3000).to_i, AccessLog: [])
server.mount_proc("/events") do |_request, response| # check here who asks
  response["Cache-Control"] = "no-store"
  response["Location"] = events_url("news")
  response.status = 307
end
server.mount_proc("/news") do |request, response| # in yours, only for POST
  # What comes over the network is bytes to Ruby, and text only where it is told so.
  response.body = publish({ topic: "news", data: request.body.to_s.dup.force_encoding("UTF-8") })
rescue StandardError => error
  response.status = 502
  response.body = "not published: #{error.message}"
end
trap("TERM") { server.shutdown }
$stdout.sync = true
puts "listening on http://127.0.0.1:#{server.listeners[0].addr[1]}"
server.start
