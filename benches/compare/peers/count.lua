-- What export-gate does in these lines, as far as a script can: verify, count, refuse. By libcrypto, as lua-resty-openssl does.
local ffi = require "ffi"
local cjson = require "cjson.safe"

ffi.cdef [[
typedef struct evp_md_st EVP_MD; typedef struct evp_pkey_st EVP_PKEY; typedef struct evp_md_ctx_st EVP_MD_CTX; typedef struct bio_st BIO;
const EVP_MD *EVP_sha256(void);
unsigned char *HMAC(const EVP_MD *md, const void *key, int key_len, const unsigned char *d, size_t n, unsigned char *out, unsigned int *len);
BIO *BIO_new_mem_buf(const void *buf, int len);
EVP_PKEY *PEM_read_bio_PUBKEY(BIO *bp, EVP_PKEY **x, void *cb, void *u);
EVP_MD_CTX *EVP_MD_CTX_new(void);
int EVP_MD_CTX_reset(EVP_MD_CTX *ctx);
int EVP_DigestVerifyInit(EVP_MD_CTX *ctx, void **pctx, const EVP_MD *type, void *e, EVP_PKEY *pkey);
int EVP_DigestVerify(EVP_MD_CTX *ctx, const unsigned char *sig, size_t siglen, const unsigned char *tbs, size_t tbslen);
]]
local crypto = ffi.load("crypto.so.3")
local digest, length = ffi.new("unsigned char[64]"), ffi.new("unsigned int[1]")
local _M, options, public_key, context = {}, nil, nil, nil

local function decoded(text)
    text = text:gsub("-", "+"):gsub("_", "/")
    return ngx.decode_base64(text .. string.rep("=", -#text % 4))
end

local function verified(message, signature)
    if options.alg == "HS256" then
        crypto.HMAC(crypto.EVP_sha256(), options.key, #options.key, message, #message, digest, length)
        return ffi.string(digest, length[0]) == signature
    end
    crypto.EVP_MD_CTX_reset(context)
    return crypto.EVP_DigestVerifyInit(context, nil, crypto.EVP_sha256(), nil, public_key) == 1
        and crypto.EVP_DigestVerify(context, signature, #signature, message, #message) == 1
end

local function claims(token)
    local message, signature = token:match("^([%w%-_]+%.[%w%-_]+)%.([%w%-_]+)$")
    if not message then return nil end
    local head, body = message:match("^(.-)%.(.+)$")
    local header = cjson.decode(decoded(head) or "")
    if not header or header.alg ~= options.alg then return nil end
    if not verified(message, decoded(signature) or "") then return nil end
    local claims = cjson.decode(decoded(body) or "")
    local good = claims and claims.iss == options.issuer and claims.aud == options.audience and claims.sub
        and (claims.exp or 0) > ngx.time()
    return good and claims or nil
end

-- Calls INCR of Redis on a kept connection.
local function incremented_by_redis(key)
    local socket = ngx.socket.tcp()
    socket:settimeout(1000)
    if not socket:connect("127.0.0.1", options.redis) then return nil end
    socket:send({ "*2\r\n$4\r\nINCR\r\n$", #key, "\r\n", key, "\r\n" })
    local line = socket:receive()
    socket:setkeepalive(60000, 256)
    return line and tonumber(line:sub(2))
end

function _M.setup(alg, key, issuer, audience, free_limit, redis)
    options = { alg = alg, key = key, issuer = issuer, audience = audience, free_limit = free_limit, redis = redis }
    if alg ~= "HS256" then
        public_key = crypto.PEM_read_bio_PUBKEY(crypto.BIO_new_mem_buf(key, #key), nil, nil, nil)
        context = crypto.EVP_MD_CTX_new()
    end
end

function _M.check()
    local sent = ngx.var.http_authorization
    local caller = sent and sent:sub(1, 7) == "Bearer " and claims(sent:sub(8))
    if not caller then return ngx.exit(401) end
    local key = caller.sub .. math.floor((ngx.time() - 345600) / 604800)
    local count = options.redis and incremented_by_redis(key) or ngx.shared.counts:incr(key, 1, 0)
    if not count then return ngx.exit(503) end
    if caller.plan == "free" and count > options.free_limit then return ngx.exit(429) end
end

return _M
