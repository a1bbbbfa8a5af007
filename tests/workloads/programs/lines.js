// A server of lines: adds up the numbers that it is sent, each once and in order.   node lines.js PORT
let last = 0, sum = 0;
require("net").createServer((socket) => {
  let rest = "";
  socket.on("error", () => socket.destroy());
  socket.on("data", (data) => {
    const lines = (rest + data).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const number = Number(line);
      if (number === last + 1) { last = number; sum = (sum * 31 + number) % 1000003; }
      socket.write(`${last} ${sum}\n`);
    }
  });
}).listen(Number(process.argv[2]), "0.0.0.0");
