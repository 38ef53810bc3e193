-- POST the body of a file, each time as another job: `@` in it is replaced by a number of the request's own.
dofile("done.lua")

local count = 0
local parts = {}

function init(arguments)
  math.randomseed(os.time())
  local file = assert(io.open(arguments[1], "rb"))
  for part in (file:read("*a") .. "@"):gmatch("(.-)@") do
    parts[#parts + 1] = part
  end
  file:close()
end

function request()
  count = count + 1
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, table.concat(parts, count))
end
