// Moves one process tree with go-criu's phaul, for the benchmark in the lab: what phaul is measured against.
//
//	go-phaul serve ADDRESS DIRECTORY          waits for one migration and restores what comes
//	go-phaul migrate PID ADDRESS DIRECTORY    moves the process there
//
// go-criu's phaul decides on the rounds; what it leaves to its user is as little as can be: calls between the two by
// net/rpc over one TCP connection, pages over a second one that criu gets, and DumpCopyRestore, which dumps, copies the
// images in one call and has them restored while the tree is held at the end of its dump.
package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/rpc"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	criu "github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/phaul"
	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

const (
	lastImages = "last"
	logLevel   = 3
)

// None is what a call without arguments takes and gives.
type None struct{}

// Images are the files of the last dump but the pages, which criu sends itself.
type Images struct {
	Names    []string
	Contents [][]byte
}

// Destination is what the source calls.
type Destination struct {
	server *phaul.Server
	done   chan error
}

// StartIter begins a round.
func (d *Destination) StartIter(_ None, _ *None) error { return d.server.StartIter() }

// StopIter ends it.
func (d *Destination) StopIter(_ None, _ *None) error { return d.server.StopIter() }

// Restore writes the images beside their pages and restores the tree.
func (d *Destination) Restore(images Images, _ *None) error {
	directory := d.server.LastImagesDir()
	for number, name := range images.Names {
		if err := os.WriteFile(filepath.Join(directory, name), images.Contents[number], 0o600); err != nil {
			return err
		}
	}
	opened, err := os.Open(directory)
	if err != nil {
		return err
	}
	defer opened.Close()
	return d.server.GetCriu().Restore(&criurpc.CriuOpts{
		ImagesDirFd: proto.Int32(int32(opened.Fd())),
		LogLevel:    proto.Int32(logLevel),
		LogFile:     proto.String("restore.log"),
	}, nil)
}

// Finish says that the tree is dead at its source.
func (d *Destination) Finish(_ None, _ *None) error {
	d.done <- nil
	return nil
}

// remote is phaul's Remote: the other end of net/rpc.
type remote struct{ client *rpc.Client }

func (r remote) StartIter() error { return r.client.Call("Destination.StartIter", None{}, &None{}) }
func (r remote) StopIter() error  { return r.client.Call("Destination.StopIter", None{}, &None{}) }

// local is phaul's Local.
type local struct{ remote remote }

// held copies the images and restores once the tree is dumped; criu holds it until this returns.
type held struct {
	criu.NoNotify
	remote    remote
	directory string
}

// PostDump is criu's notification: an error lets the tree run on.
func (h held) PostDump() error {
	images, err := readImages(h.directory)
	if err != nil {
		return err
	}
	return h.remote.client.Call("Destination.Restore", images, &None{})
}

func readImages(directory string) (Images, error) {
	entries, err := os.ReadDir(directory)
	if err != nil {
		return Images{}, err
	}
	var images Images
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".img") || !entry.Type().IsRegular() {
			continue
		}
		content, err := os.ReadFile(filepath.Join(directory, entry.Name()))
		if err != nil {
			return Images{}, err
		}
		images.Names = append(images.Names, entry.Name())
		images.Contents = append(images.Contents, content)
	}
	return images, nil
}

// DumpCopyRestore is the last round.
func (l local) DumpCopyRestore(c *criu.Criu, config phaul.Config, parent string) error {
	directory := filepath.Join(config.Wdir, lastImages)
	if err := os.Mkdir(directory, 0o700); err != nil {
		return err
	}
	opened, err := os.Open(directory)
	if err != nil {
		return err
	}
	defer opened.Close()
	return c.Dump(&criurpc.CriuOpts{
		Pid:         proto.Int32(config.Pid),
		ImagesDirFd: proto.Int32(int32(opened.Fd())),
		ParentImg:   proto.String(parent),
		TrackMem:    proto.Bool(true),
		Ps:          &criurpc.CriuPageServerInfo{Fd: proto.Int32(int32(config.Memfd))},
		LogLevel:    proto.Int32(logLevel),
		LogFile:     proto.String("dump.log"),
	}, held{remote: l.remote, directory: directory})
}

// pagesOf is the descriptor of a connection that criu inherits.
func pagesOf(connection net.Conn) (int, error) {
	file, err := connection.(*net.TCPConn).File()
	if err != nil {
		return -1, err
	}
	defer file.Close()
	descriptor, err := syscall.Dup(int(file.Fd())) // without close-on-exec; Fd has made it blocking
	runtimeKeeps = append(runtimeKeeps, connection)
	return descriptor, err
}

// runtimeKeeps are connections that would be closed with their last reference.
var runtimeKeeps []net.Conn

func serve(address, directory string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	control, err := listener.Accept()
	if err != nil {
		return err
	}
	pages, err := listener.Accept()
	if err != nil {
		return err
	}
	memfd, err := pagesOf(pages)
	if err != nil {
		return err
	}
	server, err := phaul.MakePhaulServer(phaul.Config{Memfd: memfd, Wdir: directory})
	if err != nil {
		return err
	}
	destination := &Destination{server: server, done: make(chan error, 1)}
	calls := rpc.NewServer()
	if err := calls.Register(destination); err != nil {
		return err
	}
	go func() {
		calls.ServeConn(control)
		destination.done <- errors.New("the source has gone")
	}()
	return <-destination.done
}

func migrate(pid int, address, directory string) error {
	control, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	pages, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	memfd, err := pagesOf(pages)
	if err != nil {
		return err
	}
	there := remote{client: rpc.NewClient(control)}
	client, err := phaul.MakePhaulClient(
		local{remote: there}, there, phaul.Config{Pid: int32(pid), Memfd: memfd, Wdir: directory},
	)
	if err != nil {
		return err
	}
	if err := client.Migrate(); err != nil {
		return err
	}
	return there.client.Call("Destination.Finish", None{}, &None{})
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 4 && arguments[1] == "serve":
		return serve(arguments[2], arguments[3])
	case len(arguments) == 5 && arguments[1] == "migrate":
		pid, err := strconv.Atoi(arguments[2])
		if err != nil {
			return err
		}
		return migrate(pid, arguments[3], arguments[4])
	}
	return errors.New("usage: go-phaul serve ADDRESS DIRECTORY | go-phaul migrate PID ADDRESS DIRECTORY")
}

func main() {
	log.SetFlags(0)
	if err := run(os.Args); err != nil {
		log.Fatal(err)
	}
}
