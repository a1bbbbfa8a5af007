// A server of lines: adds up the numbers that it is sent, each once and in order.   lines PORT
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
)

var mutex sync.Mutex
var last, sum int

func serve(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	for {
		line, err := reader.ReadString('\n')
		if err != nil {
			return
		}
		number, _ := strconv.Atoi(strings.TrimSpace(line))
		mutex.Lock()
		if number == last+1 {
			last, sum = number, (sum*31+number)%1000003
		}
		answer := fmt.Sprintf("%d %d\n", last, sum)
		mutex.Unlock()
		fmt.Fprint(conn, answer)
	}
}

func main() {
	listener, err := net.Listen("tcp4", "0.0.0.0:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		if conn, err := listener.Accept(); err == nil {
			go serve(conn)
		}
	}
}
